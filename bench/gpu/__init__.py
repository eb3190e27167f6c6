"""Parts of `bench/gpu_check.py`: what one command measures and proves on a CUDA machine."""
