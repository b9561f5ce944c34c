"""Mathematics and bytes: merge methods, kernels, the safetensors format, object stores and tasks.

Nothing here knows of jobs, Redis, HTTP or Ray.
"""
