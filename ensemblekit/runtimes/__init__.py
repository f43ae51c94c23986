"""Owns what runs finished models and files. So far ONNX Runtime: `onnx_runtime`."""
