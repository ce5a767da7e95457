"""Conversion: any VAE to diffusers, LDM, ONNX or into a pipeline."""
