"""Which engines are measured against which, at which precision, and how each is started."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PRECISIONS = ("fp32", "bf16", "int8", "int4")
MILLRACE = "Millrace"


@dataclass(frozen=True)
class Engine:
    """One row of the table.

    Attributes:
        peer: what --peers names; "millrace" is measured in any case.
        kind: what its converter makes of the checkpoint; empty runs the checkpoint itself.
        script: the worker, in this folder.
        options: for the worker, beside the model and the number of threads.
        environment: the name of its recipe; empty is the environment of Millrace.
        bytes_per_weight: of what it loads, to see how many engines fit into memory.
    """

    label: str
    peer: str
    precision: str
    script: str
    bytes_per_weight: float
    kind: str = ""
    options: tuple[str, ...] = ()
    environment: str = ""

    def command(self, python: str, model: Path, threads: int) -> list[str]:
        return [python, str(HERE / self.script), str(model), "--threads", str(threads), *self.options]


def _millrace(precision: str, bytes_per_weight: float, *options: str) -> Engine:
    return Engine(MILLRACE, "millrace", precision, "run_millrace.py", bytes_per_weight, options=options)


def _llama(precision: str, bytes_per_weight: float, kind: str) -> Engine:
    script = "run_llama.py"
    return Engine(f"llama.cpp {kind}", "llama.cpp", precision, script, bytes_per_weight, kind, (), "llama.cpp")


def _openvino(precision: str, bytes_per_weight: float, kind: str) -> Engine:
    script = "run_openvino.py"
    return Engine(f"OpenVINO {kind}", "openvino", precision, script, bytes_per_weight, kind, (), "openvino")


def _transformers(precision: str, bytes_per_weight: float, dtype: str) -> Engine:
    options, script = ("--dtype", dtype), "run_transformers.py"
    return Engine(f"transformers {dtype}", "transformers", precision, script, bytes_per_weight, options=options)


ENGINES = (
    _millrace("fp32", 4, "--dtype", "float32"),
    _llama("fp32", 4, "F32"),
    _transformers("fp32", 4, "float32"),
    Engine("vLLM float32", "vllm", "fp32", "run_vllm.py", 4, "", ("--dtype", "float32"), "vllm"),
    _millrace("bf16", 2),
    _llama("bf16", 2, "BF16"),
    _openvino("bf16", 2, "fp16"),
    _transformers("bf16", 2, "bfloat16"),
    _millrace("int8", 1, "--quantize", "int8"),
    _openvino("int8", 1, "int8"),
    _llama("int8", 1.1, "Q8_0"),
    Engine("CTranslate2 int8", "ctranslate2", "int8", "run_ctranslate2.py", 1, "int8", (), "ctranslate2"),
    _millrace("int4", 0.8, "--quantize", "int4"),
    _openvino("int4", 0.8, "int4"),
    _llama("int4", 0.8, "Q4_0"),
    Engine("onnxruntime-genai int4", "onnxruntime-genai", "int4", "run_onnxruntime.py", 1, "int4", (),
           "onnxruntime-genai"),
)  # fmt: skip
PEERS = tuple(dict.fromkeys(engine.peer for engine in ENGINES if engine.peer != "millrace"))
QUICK_PEERS = ("llama.cpp", "openvino")


def chosen(peers: Sequence[str], precisions: Sequence[str]) -> list[Engine]:
    """Millrace and the engines of these peers, at these precisions; raises ValueError that lists the names."""
    for names, known in ((peers, PEERS), (precisions, PRECISIONS)):
        for name in names:
            if name not in known:
                raise ValueError(f"there is no {name}; there are {', '.join(known)}")
    return [e for e in ENGINES if e.precision in precisions and e.peer in {"millrace", *peers}]
