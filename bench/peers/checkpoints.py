"""Random checkpoints at the shapes of real models, and what each peer makes of them, kept in the cache.

Beside each lies `<name>.recipe`, which tells what it was made by: where that has changed, it is made again.
"""

import functools
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.runtime.weights import synthetic
from millrace.runtime.weights.resolve import resolve_model
from millrace.runtime.weights.synthetic import preset, write_random_checkpoint
from peers.environments import Environment, OutOfTime, run

HERE = Path(__file__).parent
_SEED = 0
SHAPES = ("qwen2.5-0.5b", "llama-3.2-1b")


def checkpoint(cache: Path, shape: str) -> Path:
    """A folder in Hugging Face layout: bfloat16 weights of seed 0, and a tokenizer with a word for every id."""
    makers = [Path(__file__), Path(synthetic.__file__), resolve_model().path / "tokenizer.json"]
    recipe = _digest(preset(shape), _SEED, *map(_file_digest, makers))
    return _once(cache / "models" / shape / "checkpoint", recipe, lambda folder: _write_checkpoint(folder, shape))


def _write_checkpoint(folder: Path, shape: str) -> None:
    write_random_checkpoint(folder, shape, seed=_SEED, dtype="bfloat16")
    source = resolve_model().path
    config = json.loads((folder / "config.json").read_text("utf-8"))
    lib = json.loads((source / "tokenizer.json").read_text("utf-8"))
    widen_vocabulary(lib, config["vocab_size"])
    (folder / "tokenizer.json").write_text(json.dumps(lib), "utf-8")
    shutil.copy(source / "tokenizer_config.json", folder)


def widen_vocabulary(lib: dict[str, Any], size: int) -> None:
    """Gives a byte-level BPE tokenizer.json a word for each id below `size`; what a text encodes to stays the same.

    Without one, a random model's output would decode to nothing, and a server would send empty pieces.
    """
    words = lib["model"]["vocab"]
    used = {*words.values(), *(token["id"] for token in lib["added_tokens"])}
    free = [index for index in range(size) if index not in used]
    names = {index: f"Ġw{index}" for index in free}
    # Tokenizer classes of transformers add these where they are missing, which would be one word too many.
    names.update(zip(reversed(free), ("<|endoftext|>", "<unk>", "<s>", "</s>"), strict=False))
    words.update({word: index for index, word in names.items()})


def gguf(cache: Path, shape: str, kind: str, env: Environment, deadline: float) -> Path:
    """A GGUF file: F32 and BF16 by our converter, the rest rounded from F32 by llama.cpp itself."""
    out = cache / "models" / shape / f"{kind}.gguf"
    if kind in ("F32", "BF16"):
        source = checkpoint(cache, shape)
        command = [sys.executable, str(HERE / "convert_gguf.py"), str(source)]
        return _convert(source, out, env, deadline, lambda to: [*command, str(to), kind.lower()])
    source = gguf(cache, shape, "F32", env, deadline)
    command = [env.python, str(HERE / "convert_quantized_gguf.py"), str(source)]
    return _convert(source, out, env, deadline, lambda to: [*command, str(to), kind])


def openvino(cache: Path, shape: str, kind: str, env: Environment, deadline: float) -> Path:
    """OpenVINO's intermediate representation by optimum: fp16, int8, or int4 in groups of 128 (its defaults else)."""
    source = checkpoint(cache, shape)
    options = {"int4": ["--weight-format", "int4", "--group-size", "128", "--ratio", "1.0"]}
    command = [str(env.folder / "bin" / "optimum-cli"), "export", "openvino", "--model", str(source), "--task",
               "text-generation-with-past", *options.get(kind, ["--weight-format", kind])]  # fmt: skip
    out = cache / "models" / shape / f"openvino-{kind}"
    return _convert(source, out, env, deadline, lambda to: [*command, str(to)])


def ctranslate2(cache: Path, shape: str, kind: str, env: Environment, deadline: float) -> Path:
    source, out = checkpoint(cache, shape), cache / "models" / shape / f"ctranslate2-{kind}"
    command = [str(env.folder / "bin" / "ct2-transformers-converter"), "--model", str(source),
               "--quantization", kind, "--force", "--output_dir"]  # fmt: skip
    found = _convert(source, out, env, deadline, lambda to: [*command, str(to)])
    fill_nulls(found / "config.json")
    return found


def fill_nulls(file: Path) -> None:
    """A special token that a tokenizer lacks is null in what CTranslate2's converter writes, but its library wants
    text."""
    config = json.loads(file.read_text("utf-8"))
    filled = {key: "" if value is None else value for key, value in config.items()}
    if filled != config:
        file.write_text(json.dumps(filled, indent=2) + "\n", "utf-8")


def onnxruntime(cache: Path, shape: str, kind: str, env: Environment, deadline: float) -> Path:
    source, out = checkpoint(cache, shape), cache / "models" / shape / f"onnxruntime-genai-{kind}"
    command = [env.python, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-p", kind,
               "-e", "cpu", "-c", str(cache / "hf"), "-o"]  # fmt: skip
    return _convert(source, out, env, deadline, lambda to: [*command, str(to)])


Converter = Callable[[Path, str, str, Environment, float], Path]
CONVERTERS: Mapping[str, Converter] = {
    "llama.cpp": gguf,
    "openvino": openvino,
    "ctranslate2": ctranslate2,
    "onnxruntime-genai": onnxruntime,
}


def _convert(
    source: Path, out: Path, env: Environment, deadline: float, command: Callable[[Path], Sequence[str]]
) -> Path:
    variables = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **env.variables}

    def make(to: Path) -> None:
        if time.monotonic() > deadline:
            raise OutOfTime(f"no time is left to make {out.name}")
        run(command(to), out.parent / f"convert-{out.name}.log", deadline, variables)

    # What the command says, wherever the cache and the interpreters lie, and scripts of our own by their text.
    words = [Path(word).name if Path(word).is_absolute() else word for word in command(out)[1:]]
    scripts = [_file_digest(HERE / word) for word in words if word.endswith(".py")]
    return _once(out, _digest(_identity(source), env.version, words, scripts), make)


def _once(out: Path, recipe: str, make: Callable[[Path], None]) -> Path:
    """`out`, made under another name first, so that what has that name is whole; made anew for another recipe.

    One without a note of its recipe is from before there were such notes, and taken for one of today's.
    """
    note = _recipe(out)
    if not out.exists() or (note.is_file() and note.read_text("utf-8") != recipe):
        part = out.with_name(f"part-{out.name}")
        _remove(part)
        part.parent.mkdir(parents=True, exist_ok=True)
        make(part)
        _remove(out)
        part.rename(out)
    note.write_text(recipe, "utf-8")
    return out


def _identity(source: Path) -> str:
    """What a conversion depends on: a checkpoint's files, whichever code wrote them; or a converted file's recipe."""
    recipe = _recipe(source).read_text("utf-8")
    return _contents(source, recipe) if source.is_dir() else recipe


@functools.cache  # of gigabytes, for each peer; `recipe` because a folder may be made again
def _contents(folder: Path, recipe: str) -> str:
    return _digest({file.name: _file_digest(file) for file in folder.iterdir()})


def _recipe(out: Path) -> Path:
    return out.with_name(f"{out.name}.recipe")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
