"""Operations on tensors: one file each with the public function, its pure-torch reference and the choice of backend.

Nothing here imports more than torch, numpy, triton (if installed) and safetensors. Kernels lie in `triton/` under the
same file names; they are used for tensors on a GPU.
"""
