"""CUDA: attention of window passes beside SGLang's FlashAttention-3 backend."""
