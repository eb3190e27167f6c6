"""Rounds a GGUF file by llama.cpp: convert_quantized_gguf.py IN.gguf OUT.gguf Q8_0|Q4_0 (in its environment)."""

import ctypes
import sys

import llama_cpp


def main() -> None:
    source, out, kind = sys.argv[1:]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    params.nthread = 2
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    if status:
        sys.exit(f"error: llama_model_quantize ended with {status}")


if __name__ == "__main__":
    main()
