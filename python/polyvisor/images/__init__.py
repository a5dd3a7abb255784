"""Guest images: kernels from the distribution, and the initramfs that runs one command."""
