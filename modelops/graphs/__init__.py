"""ONNX files: which may get in, how they are read and written, what they say of themselves, how they are run."""
