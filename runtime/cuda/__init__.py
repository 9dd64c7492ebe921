"""The compiled step on an NVIDIA GPU, with the driver and CUDA's runtime library alone."""
