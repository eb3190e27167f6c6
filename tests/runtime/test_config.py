"""Configuration: the file is the defaults, and mistakes are named."""

from pathlib import Path

import pytest

from millrace.runtime.config import Config, load_config, options, render, replace
from millrace.runtime.errors import ConfigError

FILE = Path(__file__).parent.parent.parent / "config.toml"


def test_the_file_lists_every_option_with_its_default() -> None:
    assert FILE.read_text("utf-8") == render(Config())
    assert load_config(FILE) == Config()


def test_every_option_says_what_it_means() -> None:
    assert [option.key for option in options() if len(option.description) < 1] == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"server.prot": 1}, "unknown option server.prot; did you mean server.port?"),
        ({"servr.port": 1}, "unknown section .servr.; did you mean server?"),
        ({"server.max_num_seqs": 1}, "did you mean scheduler.max_num_seqs"),
        ({"server.port": 70_000}, "server.port is 70000, but: Expected `int` <= 65535"),
        ({"server.port": "80"}, "server.port is '80', but: Expected `int`, got `str`"),
        ({"scheduler.aging_seconds": 0}, "scheduler.aging_seconds is 0"),
        ({"model.dtype": "int4"}, "model.dtype is 'int4'"),
    ],
)
def test_mistakes_are_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[server]\nport = ")
    with pytest.raises(ConfigError, match=r"config.toml is not valid TOML"):
        load_config(file)
    file.write_text("server = 1")
    with pytest.raises(ConfigError, match="server must be a section"):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "absent.toml")


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[server]\nport = 1\nhost = "0.0.0.0"\n')
    config = load_config(file, {"server.port": 2})
    assert (config.server.port, config.server.host) == (2, "0.0.0.0")
    assert replace(config, {"server.port": 3}).server.host == "0.0.0.0"
