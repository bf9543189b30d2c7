"""ONNX files: what may be let in, how models are read and written, what they say of themselves, and how they are run."""
