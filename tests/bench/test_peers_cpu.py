"""bench/peers_cpu.py without any peer: protocol, turns, ratios, environments, the GGUF that our converter writes."""

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peers_cpu
import pytest
import torch
from checkpoints import make_checkpoint
from peers import checkpoints, environments, table
from peers.checkpoints import fill_nulls, widen_vocabulary
from peers.convert_gguf import convert, interleave, llama3_factors
from peers.engines import ENGINES, MILLRACE, PEERS, Engine, chosen
from peers.environments import Environment, NotBuilt, OutOfTime, Recipe, build, last_error, run
from peers.http_part import IN_PROCESS, LLAMA_SERVER, MILLRACE_SERVER, Streams, http_ratios, measure_http
from peers.measure import LOADS, Load, Samples, fit_together, measure, turns
from peers.protocol import Tally
from peers.worker import Worker, WorkerError
from rich.console import Console

from millrace.runtime.weights.resolve import resolve_model
from millrace.runtime.weights.synthetic import preset, write_random_checkpoint

SMALL = (Load("two", 2, 4, 3), Load("prompt", 1, 8, 1))
OWN = Engine(MILLRACE, "millrace", "fp32", "none", 4)
PEER = Engine("peer", "peer", "fp32", "none", 4)

WORKER = """
import sys
sys.path.insert(0, {bench!r})
from peers.protocol import serve

def load():
    print("libraries write to stdout, too")

    def generate(prompts, new_tokens, tally):
        if prompts[0][0] == 13:
            raise ValueError("unlucky")
        if prompts[0][0] == 14:
            sys.exit("gone")
        if prompts[0][0] == 15:
            import time
            time.sleep(60)
        for step in range(new_tokens - (prompts[0][0] == 16)):
            for number, prompt in enumerate(prompts):
                tally.add(number, prompt[0] + step)

    return generate, {{"fake": "1.0"}}

serve(load)
"""


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Worker]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(bench=str(Path(peers_cpu.__file__).parent)))

    def begin(limit: float = 30.0, code: str | None = None) -> Worker:
        command = [sys.executable, str(script)] if code is None else [sys.executable, "-c", code]
        return Worker(command, {"A": "b"}, tmp_path / "worker.log", limit)

    return begin


def test_decoding_begins_when_every_sequence_has_a_token() -> None:
    clock = Clock()
    tally = Tally(2, clock)
    clock.time += 1
    tally.add(0, 5)
    clock.time += 1
    tally.add(0, 6)
    tally.add(1)  # nothing came
    clock.time += 1
    tally.add(1, 7)
    clock.time += 2
    tally.add(1, 8)
    answer = tally.answer(2)
    assert answer == {"seconds": 5.0, "started": 3.0, "tokens_at_start": 3, "ids": [[5, 6], [7, 8]]}
    assert Load("", 2, 4, 2).rate(answer) == 1 / 2
    assert Load("", 2, 6, 1).rate(answer) == 12 / 3  # tokens of the prompts until there is an answer to each


def test_a_short_answer_is_none() -> None:
    tally = Tally(2)
    tally.add(0, 1, 2)
    with pytest.raises(RuntimeError, match=r"2 tokens .* \[2, 0\]"):
        tally.answer(2)


def test_a_worker_answers_job_after_job(start: Callable[..., Worker]) -> None:
    worker = start()
    assert worker.versions == {"fake": "1.0"}
    assert worker.run([[3], [9]], 2)["ids"] == [[3, 4], [9, 10]]
    assert worker.run([[4]], 1)["ids"] == [[4]]
    worker.close()
    worker.close()


@pytest.mark.parametrize(
    ("first", "told"), [(13, "ValueError: unlucky"), (14, "status 1: gone"), (16, r"RuntimeError: 2 tokens")]
)
def test_what_goes_wrong_in_a_worker_is_told(start: Callable[..., Worker], first: int, told: str) -> None:
    worker = start()
    with pytest.raises(WorkerError, match=told):
        worker.run([[first]], 2)


def test_a_worker_that_does_not_answer_is_ended(start: Callable[..., Worker]) -> None:
    worker = start()
    worker._limit = 0.2
    with pytest.raises(WorkerError, match=r"no answer in 0\.2 s"):
        worker.run([[15]], 2)
    with pytest.raises(WorkerError, match="ended with status -9"):
        worker.run([[1]], 1)


def test_a_worker_that_cannot_load(start: Callable[..., Worker]) -> None:
    with pytest.raises(WorkerError, match="status 1: ModuleNotFoundError: No module named 'no_such'"):
        start(code="import no_such")


class Fake:
    """Gives sequence n the id n; each step takes `seconds`."""

    def __init__(self, clock: Clock, seconds: float, fails_at: int = -1) -> None:
        self.versions, self.closed, self.jobs = {"v": "1"}, False, 0
        self._clock, self._seconds, self._fails_at = clock, seconds, fails_at

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        self.jobs += 1
        if self.jobs == self._fails_at:
            raise WorkerError("out of memory")
        tally = Tally(len(prompts), self._clock)
        for _ in range(new_tokens):
            self._clock.time += self._seconds
            for number in range(len(prompts)):
                tally.add(number, number)
        return tally.answer(new_tokens)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("together", [True, False])
def test_engines_take_turns_and_rounds_give_ratios(together: bool) -> None:
    clock, workers, said = Clock(), [], []

    def begin(engine: Engine) -> Fake:
        workers.append(Fake(clock, 1.0 if engine is OWN else 3.0))
        return workers[-1]

    rates = iter([1e9, 2e9, 3e9, 4e9])
    samples = measure([OWN, PEER], begin, together, 2, 1e9, said.append, rates.__next__, SMALL, clock)
    assert len(workers) == (2 if together else 4) and all(worker.closed for worker in workers)
    assert table.ratios(samples, "peer", SMALL[0]) == [3.0, 3.0] == table.ratios(samples, "peer", SMALL[1])
    assert table.spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0} and table.spread([]) is None
    assert table.agreement(samples, "peer") == 1.0
    assert said[0] == "round 1, two: Millrace" and len(said) == 8 and not samples.failed
    assert samples.read_rates == {"two": [1e9, 3e9], "prompt": [2e9, 4e9]}


def test_an_engine_that_fails_is_out_and_the_rest_goes_on() -> None:
    clock = Clock()
    made = {OWN: Fake(clock, 1.0), PEER: Fake(clock, 1.0, fails_at=3)}
    samples = measure([OWN, PEER], made.__getitem__, True, 2, 1e9, lambda _: None, lambda: 1e9, SMALL, clock)
    assert samples.failed == {"peer": "prompt: out of memory"}
    assert made[PEER].closed and made[PEER].jobs == 3 and made[OWN].jobs == 6
    assert samples.answers["peer"]["prompt"] == [None, None]
    assert table.ratios(samples, "peer", SMALL[0]) == [1.0]
    assert table.ratios(samples, "peer", SMALL[1]) == []


def test_an_engine_that_cannot_start_is_out() -> None:
    def begin(engine: Engine) -> Fake:
        if engine is PEER:
            raise WorkerError("no such library")
        return Fake(Clock(), 1.0)

    samples = measure([PEER], begin, True, 1, 1e9, lambda _: None, lambda: 1e9, SMALL, Clock())
    assert samples.failed == {"peer": "two: no such library"}
    assert table.agreement(samples, "peer") is None


def test_nothing_begins_after_the_deadline() -> None:
    clock = Clock()
    end = clock() + 8
    samples = measure([OWN], lambda _: Fake(clock, 1.0), True, 3, end, lambda _: None, lambda: 1e9, SMALL, clock)
    assert samples.failed == {"time": "ran out in round 2 at prompt"}
    assert [len([a for a in answers if a]) for answers in samples.answers[MILLRACE].values()] == [2, 1]


def test_the_order_moves_on() -> None:
    third = Engine("third", "third", "fp32", "none", 4)
    engines = [OWN, PEER, third]
    together = [engine.label for engine, _ in turns(engines, SMALL, 1, True)]
    assert together == ["peer", "third", MILLRACE, "third", MILLRACE, "peer"]
    alone = [engine.label for engine, _ in turns(engines, SMALL, 2, False)]
    assert alone == ["third", "third", MILLRACE, MILLRACE, "peer", "peer"]


def test_how_many_fit_into_memory() -> None:
    assert fit_together([OWN, PEER], 500_000_000, 8_000_000_000)
    assert not fit_together([OWN, PEER], 1_200_000_000, 13_000_000_000)


def test_rounds_have_prompts_of_their_own_and_repeat() -> None:
    load = LOADS[1]
    assert load.prompts(0) == load.prompts(0) != load.prompts(1)
    assert [len(prompt) for prompt in load.prompts(0)] == [128] * 8


def test_bytes_of_a_step_and_the_floor() -> None:
    config = preset("qwen2.5-0.5b")
    matrices = 493_961_216  # of the checkpoint: norms and biases are no matrices
    assert table.weight_bytes(config, "fp32") == 4 * matrices
    assert table.weight_bytes(config, "bf16") == 2 * matrices
    logits = 151_936 * 896
    assert table.weight_bytes(config, "int4", 128) == logits + (matrices - logits) * (0.5 + 4 / 128)
    assert table.floor_rate(config, "int8", LOADS[1], 10e9) == pytest.approx(8 * 10e9 / matrices)


def test_each_engine_is_named_once_and_its_worker_is_there() -> None:
    rows = [(engine.precision, engine.label) for engine in ENGINES]
    assert len(rows) == len(set(rows))
    for engine in ENGINES:
        assert Path(engine.command("python", Path("m"), 2)[1]).is_file()
    assert {engine.peer for engine in chosen(["openvino"], ["int8"])} == {"millrace", "openvino"}
    with pytest.raises(ValueError, match=f"there is no ollama; there are {', '.join(PEERS)}"):
        chosen(["ollama"], ["int8"])


def results(own: float, other: float) -> Samples:
    def answer(seconds: float, load: Load) -> dict[str, Any]:
        ids = [[1] * load.new_tokens] * load.sequences
        return {"seconds": seconds + 1, "started": 1.0, "tokens_at_start": load.sequences, "ids": ids}

    return Samples(
        {
            MILLRACE: {load.name: [answer(own, load), answer(own, load)] for load in LOADS},
            "llama.cpp F32": {load.name: [answer(other, load), None] for load in LOADS},
        },
        {load.name: [20e9, 10e9] for load in LOADS},
    )


@pytest.mark.slow
def test_tables_json_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parts = {"fp32": results(1.0, 2.0), "int8": results(1.0, 4.0)}
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    config = preset("qwen2.5-0.5b")
    console.print(table.ratio_table("shape", parts, LOADS))
    console.print(table.floor_table("shape", config, parts, LOADS))
    said = console.export_text()
    assert "2.00 (2.00-2.00)" in said and "4.00 (4.00-4.00)" in said and "100%" in said
    shape = json.loads(json.dumps(table.summary(config, parts, LOADS)))
    floor = table.floor_rate(config, "fp32", LOADS[0], 20e9)
    share = shape["fp32"]["floor_shares"][MILLRACE]["batch 1"]  # of rounds, each at the rate that the machine had then
    assert (share["min"], share["max"]) == pytest.approx((63 / floor, 2 * 63 / floor))
    assert shape["fp32"]["floor_shares"]["llama.cpp F32"]["batch 1"]["max"] == pytest.approx(31.5 / floor)
    assert shape["int8"]["ratios"]["llama.cpp F32"]["batch 16"] == {"min": 4.0, "median": 4.0, "max": 4.0}
    assert shape["fp32"]["rates"]["llama.cpp F32"]["batch 1"] == [63 / 2.0]
    assert shape["fp32"]["whole"]["llama.cpp F32"]["batch 1"] == [{"seconds": 3.0, "first_tokens": 1.0}, None]
    result = {"threads": 2, "loads": [load.name for load in LOADS], "shapes": {"shape": shape}}
    table.plot(result, tmp_path / "plots" / "out.png")
    assert (tmp_path / "plots" / "out.png").read_bytes()[:4] == b"\x89PNG"


class FakeServer:
    def __init__(self, rate: float, first: float, fails: bool = False) -> None:
        self._answer, self._fails, self.closed = Streams(1024 / rate, [first] * 15 + [60.0], 1024), fails, False

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Streams:
        if self._fails:
            raise WorkerError("HTTP 500")
        return self._answer

    def close(self) -> None:
        self.closed = True


def test_servers_take_turns() -> None:
    ours, theirs, inside = FakeServer(300.0, 0.5), FakeServer(100.0, 2.0), Fake(Clock(), 0.0)
    inside.run = lambda prompts, new_tokens: {"seconds": 1024 / 310}  # type: ignore[method-assign,assignment]
    servers = {MILLRACE_SERVER: lambda: ours, LLAMA_SERVER: lambda: theirs}
    result = measure_http(servers, lambda: inside, 2, time.monotonic() + 60, lambda _: None)  # type: ignore[arg-type]
    assert result["rates"][IN_PROCESS] == pytest.approx([310, 310]) and not result["failed"]
    assert [found["median"] for found in result["ratios"].values()] == pytest.approx([3.0, 0.25, 300 / 310])
    assert ours.closed and theirs.closed and inside.closed
    late = measure_http(servers, lambda: inside, 2, time.monotonic() - 1, lambda _: None)  # type: ignore[arg-type]
    assert "ran out in round 1" in late["failed"]["time"]


def test_a_server_that_fails_is_out() -> None:
    broken = FakeServer(1.0, 1.0, fails=True)
    inside = Fake(Clock(), 0.0)
    inside.run = lambda prompts, new_tokens: {"seconds": 1.0}  # type: ignore[method-assign,assignment]
    servers = {MILLRACE_SERVER: lambda: broken}
    result = measure_http(servers, lambda: inside, 1, time.monotonic() + 60, lambda _: None)  # type: ignore[arg-type]
    assert result["failed"] == {MILLRACE_SERVER: "HTTP 500"} and broken.closed
    assert set(http_ratios({}, {}).values()) == {None}


def test_an_environment_is_built_once_and_a_failure_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_pip(command: list[str], *rest: Any) -> str:
        return run([*command, "--without-pip"] if "venv" in command else command, *rest)

    monkeypatch.setattr(environments, "run", without_pip)
    counted = tmp_path / "count"
    command = ("{env}/bin/python", "-c", f"open({str(counted)!r}, 'a').write('x')")
    recipe = Recipe("works", (), "import os; print('version', os.environ['KEPT'])", (command,), {"KEPT": "{env}"})
    first = build(recipe, tmp_path, 100)
    assert first == build(recipe, tmp_path, 100) and counted.read_text() == "x"
    assert first.version == f"version {first.folder}" and Path(first.python).is_file()
    broken = Recipe("works", (), "raise SystemExit('error: no such CPU')")
    with pytest.raises(NotBuilt, match="error: no such CPU; the log is"):
        build(broken, tmp_path, 100)
    with pytest.raises(NotBuilt, match="tried before; --rebuild works"):
        build(broken, tmp_path, 100)


def test_a_command_has_its_time(tmp_path: Path) -> None:
    with pytest.raises(OutOfTime, match="`sleep 100` did not end within its time"):
        run(["sleep", "100"], tmp_path / "log", time.monotonic())
    with pytest.raises(NotBuilt, match="`no-such-command`"):
        run(["no-such-command"], tmp_path / "log", time.monotonic() + 10)
    assert last_error("a\nerror: b\n  c\n") == "error: b"
    assert last_error("  OSError: full\nnote: see above\nerror: pip failed\n") == "OSError: full"
    assert last_error("c\n") == "c" and last_error("") == "nothing was printed"


def test_models_are_made_again_where_their_recipe_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts, shape = tmp_path / "scripts", "qwen2.5-0.5b"
    scripts.mkdir()
    for name in ("convert_gguf.py", "convert_quantized_gguf.py"):
        (scripts / name).write_text("import sys; open(sys.argv[2], 'x').write(open(sys.argv[1]).read() + sys.argv[3])")
    monkeypatch.setattr(checkpoints, "HERE", scripts)
    monkeypatch.setattr(checkpoints, "_write_checkpoint", lambda path, shape: path.write_text("model "))

    def made(version: str = "1") -> str:
        env = Environment(Path(sys.prefix), {}, version)
        return checkpoints.gguf(tmp_path, shape, "Q8_0", env, time.monotonic() + 60).read_text()

    folder = tmp_path / "models" / shape
    assert made() == "model f32Q8_0"
    (folder / "Q8_0.gguf").write_text("kept")
    assert made() == "kept"
    assert made("2") == "model f32Q8_0"  # of another release of the peer
    for note in folder.glob("*.recipe"):
        note.unlink()
    (folder / "Q8_0.gguf").write_text("from before there were notes")
    assert made("2") == "from before there were notes"
    (scripts / "convert_gguf.py").write_text("import sys; open(sys.argv[2], 'x').write('changed ')")
    assert made("2") == "changed Q8_0"
    monkeypatch.setattr(checkpoints, "_SEED", 1)
    monkeypatch.setattr(checkpoints, "_write_checkpoint", lambda path, shape: path.write_text("other "))
    (scripts / "convert_gguf.py").write_text("import sys; open(sys.argv[2], 'x').write(open(sys.argv[1]).read())")
    assert made("2") == "other Q8_0"


def test_a_checkpoint_that_comes_out_the_same_is_not_converted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts, shape = tmp_path / "scripts", "qwen2.5-0.5b"
    scripts.mkdir()
    (scripts / "convert_gguf.py").write_text("import sys; open(sys.argv[2], 'x').write('converted')")
    monkeypatch.setattr(checkpoints, "HERE", scripts)

    def made(seed: int, config: str) -> str:
        def write(folder: Path, shape: str) -> None:
            folder.mkdir()
            (folder / "config.json").write_text(config)

        monkeypatch.setattr(checkpoints, "_SEED", seed)
        monkeypatch.setattr(checkpoints, "_write_checkpoint", write)
        env = Environment(Path(sys.prefix), {}, "1")
        return checkpoints.gguf(tmp_path, shape, "F32", env, time.monotonic() + 60).read_text()

    assert made(0, "{}") == "converted"
    (tmp_path / "models" / shape / "F32.gguf").write_text("kept")
    assert made(1, "{}") == "kept"  # other code, the same files
    assert made(2, "[]") == "converted"


def test_no_id_ends_a_sequence_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint("qwen2", tmp_path / "model", eos_token_id=list(range(199)))
    monkeypatch.syspath_prepend(str(Path(checkpoints.__file__).parent))
    generate, _ = importlib.import_module("run_transformers").load(str(folder), 1, "float32")
    tally = Tally(2)
    generate([[5, 6, 7], [8, 9, 10]], 6, tally)
    assert [len(ids) for ids in tally.ids] == [6, 6]


def gguf_of(folder: Path, shape: dict[str, Any], kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    gguf = pytest.importorskip("gguf")
    write_random_checkpoint(folder, shape, dtype="bfloat16")
    lib = json.loads((resolve_model().path / "tokenizer.json").read_text())
    widen_vocabulary(lib, shape["vocab_size"])
    (folder / "tokenizer.json").write_text(json.dumps(lib))
    convert(folder, folder / "out.gguf", kind)
    reader = gguf.GGUFReader(folder / "out.gguf")
    from safetensors.torch import load_file

    return reader, load_file(folder / "model.safetensors")


def values(reader: Any, name: str) -> torch.Tensor:
    from gguf import dequantize

    (tensor,) = (t for t in reader.tensors if t.name == name)
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 4200}  # fmt: skip


def test_gguf_of_qwen2(tmp_path: Path) -> None:
    config = {**preset("qwen2.5-0.5b"), **SHAPE, "eos_token_id": 1, "bos_token_id": 0}
    reader, tensors = gguf_of(tmp_path, config, "f32")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen2"
    assert fields["qwen2.attention.head_count_kv"] == 2 and fields["qwen2.rope.freq_base"] == 1000000.0
    words = fields["tokenizer.ggml.tokens"]
    assert len(words) == 4200 and words[1] == "<|end|>" and words[4195] == "Ġw4195" and words[4199] == "<|endoftext|>"
    assert fields["tokenizer.ggml.token_type"][1] == 3
    assert len(reader.tensors) == len(tensors)
    assert torch.equal(values(reader, "token_embd.weight"), tensors["model.embed_tokens.weight"].float())
    for ours, theirs in (("attn_q.weight", "self_attn.q_proj.weight"), ("attn_k.bias", "self_attn.k_proj.bias"),
                         ("ffn_down.weight", "mlp.down_proj.weight"), ("ffn_norm.weight", "post_attention_layernorm.weight")):  # fmt: skip  # noqa: E501
        assert torch.equal(values(reader, f"blk.1.{ours}"), tensors[f"model.layers.1.{theirs}"].float())


def test_gguf_of_llama_in_bf16(tmp_path: Path) -> None:
    config = {**preset("llama-3.2-1b"), **SHAPE, "head_dim": 16, "eos_token_id": [1, 2], "bos_token_id": 0}
    reader, tensors = gguf_of(tmp_path, config, "bf16")
    heads = tensors["model.layers.0.self_attn.k_proj.weight"].float().unflatten(0, (2, 16))
    found = values(reader, "blk.0.attn_k.weight").unflatten(0, (2, 16))
    assert torch.equal(found[:, 0::2], heads[:, :8]) and torch.equal(found[:, 1::2], heads[:, 8:])
    (stored,) = (t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    assert stored.tensor_type.name == "BF16"
    assert torch.equal(values(reader, stored.name), tensors["model.layers.0.mlp.up_proj.weight"].float())
    factors = llama3_factors(config, 16)
    assert factors is not None and torch.equal(values(reader, "rope_freqs.weight"), factors)
    assert factors[0] == 1 and factors[-1] == 32  # fast dimensions stay, slow ones are stretched
    assert not any(tensor.name == "output.weight" for tensor in reader.tensors)  # tied


def test_interleaving_keeps_vectors_whole() -> None:
    assert interleave(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_wide_tokenizer_encodes_as_before() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    lib = json.loads((resolve_model().path / "tokenizer.json").read_text())
    before = tokenizers.Tokenizer.from_str(json.dumps(lib))
    widen_vocabulary(lib, 5000)
    after = tokenizers.Tokenizer.from_str(json.dumps(lib))
    text = "The old mill grinds w4999 grain.<|end|>"
    assert after.encode(text).ids == before.encode(text).ids
    assert after.get_vocab_size() == 5000 and after.decode([4995]) == " w4995"


@pytest.mark.parametrize(
    ("arguments", "told"), [(["--peers", "ollama"], "there is no ollama"), (["--rounds", "0"], "at least 1")]
)
def test_wrong_arguments(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        peers_cpu.main(arguments)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_streams_over_http_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(peers_cpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(peers_cpu.Bench, "build", lambda self, engines: built.extend(e.label for e in engines))
    monkeypatch.setattr(peers_cpu.Bench, "measure_http", lambda self, shape: {"failed": {}, "ratios": {}, "of": shape})
    file = tmp_path / "result.json"
    arguments = ["--http-only", "--shapes", "llama-3.2-1b", "--json", str(file), "--plot", str(tmp_path / "plot.png")]
    assert peers_cpu.main(arguments) == 0
    assert built == ["llama.cpp Q8_0"]
    result = json.loads(file.read_text())
    assert result["shapes"] == {} and result["http"]["llama-3.2-1b"]["of"] == "llama-3.2-1b"
    with pytest.raises(SystemExit):
        peers_cpu.main(["--http-only", "--precisions", "int8"])


def test_results_are_shown_as_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, parts = preset("qwen2.5-0.5b"), {"int8": results(1.0, 4.0)}
    ratios = {"tokens over llama-server's": {"min": 2.0, "median": 3.0, "max": 4.0}, "none": None}
    result = {
        "threads": peers_cpu.available_cores() + 1,  # of another machine
        "loads": [load.name for load in LOADS],
        "shapes": {"small": table.summary(config, parts, LOADS)},
        "http": {"small": {"load": "16 streams", "ratios": ratios}},
        "not_built": {},
    }
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    assert peers_cpu.main(["--show", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "|  | peer | batch 1 | batch 8 | batch 16 | prefill 512 |" in lines
    assert "| int8 | llama.cpp F32 |" + " 4.00 (4.00-4.00) |" * 3 + " 1.00 (1.00-1.00) |" in lines
    assert "| tokens over llama-server's | 3.00 (2.00-4.00) |" in lines and "| none | - |" in lines
    share = table.floor_shares(config, "int8", parts["int8"], MILLRACE, LOADS[0])
    assert share is not None and any(line.startswith(f"| int8 | Millrace | {share['median']:.0%} |") for line in lines)


def test_a_run_is_added_to_an_earlier_one() -> None:
    def result(shapes: dict[str, Any], **others: Any) -> dict[str, Any]:
        return {"rounds": 3, "not_built": {}, "shapes": shapes, "http": {}, **others}

    def part(name: str, *values: float) -> dict[str, Any]:
        return {"rates": {name: {"two": list(values)}}}

    old, new, stopped = part("old", 1.0), part("new", 2.0), part("stopped")
    built = {"vllm": "no wheel", "openvino": "no time"}
    earlier = result({"small": {"int8": old, "int4": old}}, http={"small": "kept"}, not_built=built)
    later = result({"small": {"fp32": new, "int8": new, "int4": stopped}, "large": {"bf16": new}})
    found = table.added(earlier, later, ["openvino"])
    assert found["shapes"] == {"small": {"fp32": new, "int8": new, "int4": old}, "large": {"bf16": new}}
    assert list(found["shapes"]["small"]) == ["fp32", "int8", "int4"]
    assert found["http"] == {"small": "kept"} and found["not_built"] == {"vllm": "no wheel"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "run once without"),
        ("{}", "run once without"),
        ("[]", "run once without"),
        ('{"threads": 7, "loads": ["two"], "shapes": {}, "http": {}, "not_built": {}}', "of the loads two"),
        (
            '{"threads": 7, "loads": ["batch 1", "batch 8", "batch 16", "prefill 512"], "shapes": {}, "http": {}, '
            '"not_built": {}}',
            "of 7 threads, not 3",
        ),
    ],
)
def test_there_must_be_a_run_to_add_to(
    text: str | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "earlier.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit):
        peers_cpu.main(["--add", "--threads", "3", "--json", str(file)])
    assert complaint in capsys.readouterr().err


def test_tokens_that_a_tokenizer_lacks_are_text(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"bos_token": null, "eos_token": "<|end|>", "layer_norm_epsilon": 1e-05}')
    fill_nulls(file)
    assert json.loads(file.read_text()) == {"bos_token": "", "eos_token": "<|end|>", "layer_norm_epsilon": 1e-05}
