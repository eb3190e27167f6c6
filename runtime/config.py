"""Configuration: one frozen section per reader, each option with its default, bounds and one-line meaning.

Order of precedence: keyword or flag, then the file, then the default. `config.toml` at the top of the tree is
`render(Config())`, which a test proves.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from millrace.runtime.errors import ConfigError


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: Annotated[
        str, Meta(description="checkpoint folder, GGUF file or hub id; empty is the embedded model, grist")
    ] = ""
    served_name: Annotated[str, Meta(description="name that clients use; empty takes the folder's")] = ""
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="how weights are stored: auto, float32 (CPU), bfloat16 or float16"),
    ] = "auto"
    max_model_len: Annotated[int, Meta(ge=0, description="longest context in tokens; 0 is the checkpoint's")] = 0
    quantize: Annotated[
        Literal["none", "int8", "int4", "nf4", "fp8"],
        Meta(
            description="round weights as they are loaded: none, int8 or fp8 (per output; fp8 rounds activations on a "
            "GPU too), int4 or nf4 (groups)"
        ),
    ] = "none"
    quantize_group_size: Annotated[
        int,
        Meta(ge=16, le=4096, description="inputs that share a scale with int4 and nf4; smaller is larger and truer"),
    ] = 64
    build: Annotated[
        str,
        Meta(
            description="folder that `millrace build` made of this model, for a start without torch on the CPU; "
            "empty packs each time"
        ),
    ] = ""
    random_weights: Annotated[
        str, Meta(description="run a named shape with random weights instead of a checkpoint, for measuring")
    ] = ""


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="auto, cpu or cuda; auto is a CUDA GPU where there is one")
    ] = "auto"
    index: Annotated[int, Meta(ge=0, le=255, description="which GPU, counted from 0")] = 0
    memory_fraction: Annotated[
        float, Meta(gt=0, le=1, description="share of the GPU's memory that may be used in all")
    ] = 0.9
    cuda_graphs: Annotated[bool, Meta(description="capture decode steps as CUDA graphs; else launch them op by op")] = (
        True
    )
    batch_invariant: Annotated[
        bool, Meta(description="on a GPU: attention splits do not depend on the batch; slower for few long sequences")
    ] = False
    threads: Annotated[int, Meta(ge=0, le=1024, description="CPU threads for arithmetic; 0 is all cores")] = 0
    compile_kernels: Annotated[
        bool, Meta(description="build the C++ kernels, once, where a compiler is found; else torch serves")
    ] = True


class KVConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    memory_mb: Annotated[
        int,
        Meta(
            ge=0,
            description="memory for the KV cache in MiB; 0 is up to a quarter of RAM, or what a GPU has left",
        ),
    ] = 0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "fp8", "int8"],
        Meta(
            description="of keys and values: auto (16 bits; float32 where the weights are), float32 or bfloat16 (CPU), "
            "fp8 or int8 (with scales)"
        ),
    ] = "auto"
    prefix_cache: Annotated[bool, Meta(description="reuse the blocks of prompts with the same beginning")] = True
    swap_memory_mb: Annotated[
        int,
        Meta(
            ge=0,
            description="GPU only: pinned host MiB for preempted sequences, where copying beats computing; 0 is off",
        ),
    ] = 0


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_num_seqs: Annotated[int, Meta(ge=1, le=4096, description="sequences that run at once")] = 64
    max_queue: Annotated[int, Meta(ge=1, le=1_000_000, description="requests that wait; one more is refused")] = 1024
    max_prefill_tokens: Annotated[int, Meta(ge=16, le=65536, description="prompt tokens in one prefill step")] = 512
    inter_token_target_ms: Annotated[
        int,
        Meta(ge=0, le=60_000, description="prefill chunks shrink so that decoding streams wait no longer; 0 is off"),
    ] = 250
    aging_seconds: Annotated[
        float, Meta(gt=0, le=86_400, description="a request that waits this long moves up one priority class")
    ] = 10.0
    overlap: Annotated[bool, Meta(description="launch a step before the one before it has been read")] = True


class StreamerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_unread_tokens: Annotated[
        int, Meta(ge=1, le=1_000_000, description="tokens a reader may leave unread before its request pauses")
    ] = 256


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    allowed_origins: Annotated[
        tuple[str, ...], Meta(description="browser origins that may connect besides the server's own; * is any")
    ] = ()
    request_timeout_s: Annotated[
        float, Meta(ge=0, le=86_400, description="deadline of a request that names none; 0 is none")
    ] = 600.0
    stall_timeout_s: Annotated[
        float, Meta(gt=0, le=3600, description="a client that reads nothing for this long is disconnected")
    ] = 30.0
    flush_interval_ms: Annotated[
        float, Meta(ge=0, le=1000, description="a stream writes at most this often; tokens between share a write")
    ] = 5.0
    shutdown_grace_s: Annotated[
        float, Meta(ge=0, le=3600, description="time that open streams get to finish when the server stops")
    ] = 20.0


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_body_bytes: Annotated[int, Meta(ge=1024, description="request body")] = 8_388_608
    max_ws_message_bytes: Annotated[int, Meta(ge=1024, description="one WebSocket message")] = 1_048_576
    max_header_bytes: Annotated[int, Meta(ge=1024, description="one header field, and the request line")] = 8190
    header_timeout_s: Annotated[float, Meta(gt=0, description="time for a complete request head")] = 10.0
    body_timeout_s: Annotated[float, Meta(gt=0, description="time for a complete request body")] = 30.0
    max_json_depth: Annotated[int, Meta(ge=4, description="nesting of a JSON body")] = 64
    max_choices: Annotated[int, Meta(ge=1, le=128, description="n")] = 8
    max_prompts: Annotated[int, Meta(ge=1, description="prompts in one completions request")] = 64
    max_messages: Annotated[int, Meta(ge=1, description="messages in one chat request")] = 2048
    max_stop: Annotated[int, Meta(ge=1, description="stop strings")] = 16
    max_stop_chars: Annotated[int, Meta(ge=1, description="length of one stop string")] = 256
    max_stop_token_ids: Annotated[int, Meta(ge=1, description="stop token ids")] = 64
    max_logprobs: Annotated[int, Meta(ge=0, le=100, description="top alternatives per token")] = 20
    max_logit_bias: Annotated[int, Meta(ge=1, description="entries of logit_bias")] = 300
    max_token_ids: Annotated[int, Meta(ge=1, description="entries of allowed_token_ids and of banned ids")] = 4096
    max_name_chars: Annotated[int, Meta(ge=1, description="model names, request ids, cache salts")] = 256
    max_ws_requests: Annotated[int, Meta(ge=1, description="requests at once on one WebSocket")] = 64
    max_connections: Annotated[int, Meta(ge=1, description="open connections")] = 10_000


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="debug, info, warning or error")
    ] = "info"
    json: Annotated[bool, Meta(description="one JSON object a line instead of text")] = False


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: ModelConfig = ModelConfig()
    device: DeviceConfig = DeviceConfig()
    kv: KVConfig = KVConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    streamer: StreamerConfig = StreamerConfig()
    server: ServerConfig = ServerConfig()
    limits: Limits = Limits()
    log: LogConfig = LogConfig()


class Option(msgspec.Struct, frozen=True):
    """One option of config.toml; `section.name` is its key and `--section-name` its flag."""

    section: str
    name: str
    kind: type
    choices: tuple[str, ...]  # empty: any value within the bounds
    default: Any
    description: str

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        return "--" + f"{self.section}-{self.name}".replace("_", "-")


def options() -> Iterator[Option]:
    """Every option, section by section, in the order of the structs."""
    for section, kind in get_type_hints(Config).items():
        defaults = kind()
        for name, annotation in get_type_hints(kind, include_extras=True).items():
            base, *extras = get_args(annotation)
            description = next((m.description for m in extras if isinstance(m, Meta) and m.description), "")
            default = getattr(defaults, name)
            yield Option(
                section,
                name,
                type(default),
                get_args(base) if get_origin(base) is Literal else (),
                default,
                description,
            )


def load_config(file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a TOML file and applies overrides by key (`"server.port": 8001`).

    Raises ConfigError that names the option, its value and its bounds; for an unknown key, the nearest known one.
    """
    data: dict[str, Any] = {}
    if file is not None:
        try:
            data = tomllib.loads(file.read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid TOML: {error}") from error
    _refuse_unknown(data, file)
    for key, value in (overrides or {}).items():
        section, _, name = key.partition(".")
        data.setdefault(section, {})[name] = value
    _refuse_unknown(data, None)
    try:
        return msgspec.convert(data, Config, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{_origin(file)}{_explain(str(error), data)}") from error


def replace(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The same configuration with some options changed, by key."""
    data = msgspec.to_builtins(config)
    given = {f"{section}.{name}": value for section, options in data.items() for name, value in options.items()}
    return load_config(None, {**given, **overrides})


def render(config: Config) -> str:
    """The configuration as TOML, with every option and its meaning."""
    lines = ["# Every option of Millrace with its default. Any of them can be given as a flag: --server-port 8001"]
    section = ""
    for option in options():
        if option.section != section:
            section = option.section
            lines += ["", f"[{section}]"]
        value = getattr(getattr(config, section), option.name)
        lines.append(f"{option.name} = {_toml(value)}  # {option.description}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value)  # TOML's strings, numbers and booleans are written as JSON's


def _origin(file: Path | None) -> str:
    return f"{file}: " if file is not None else ""


def _explain(message: str, data: dict[str, Any]) -> str:
    """Appends the value at fault to msgspec's message, which names the path and the bound but not the value."""
    text, _, path = message.rpartition(" - at `$.")
    section, _, name = path.rstrip("`").partition(".")
    if text and section in data and name in data[section]:
        return f"option {section}.{name} is {data[section][name]!r}, but: {text}"
    return message


def _refuse_unknown(data: dict[str, Any], file: Path | None) -> None:
    known: dict[str, list[str]] = {}
    for option in options():
        known.setdefault(option.section, []).append(option.name)
    for section, values in data.items():
        if section not in known:
            raise ConfigError(f"{_origin(file)}unknown section [{section}]{_nearest(section, list(known))}")
        if not isinstance(values, dict):
            raise ConfigError(f"{_origin(file)}{section} must be a section, [{section}], not {values!r}")
        for name in values:
            if name not in known[section]:
                everywhere = [f"{s}.{n}" for s, names in known.items() for n in names]
                near = difflib.get_close_matches(name, known[section], 1, 0.5)
                hint = f"; did you mean {section}.{near[0]}?" if near else _nearest(f"{section}.{name}", everywhere)
                raise ConfigError(f"{_origin(file)}unknown option {section}.{name}{hint}", param=f"{section}.{name}")


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.0)
    return f"; did you mean {near[0]}?" if near else ""
