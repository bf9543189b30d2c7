"""Simplifiers and fusers called as their own documentation says, each on files; for the columns beside ours."""

from __future__ import annotations

from pathlib import Path


def onnxsim(source: str, target: str) -> None:
    import onnx
    import onnxsim

    model, _ = onnxsim.simplify(source)
    onnx.save(model, target)


def onnxslim(source: str, target: str) -> None:
    import onnx
    import onnxslim

    onnx.save(onnxslim.slim(source), target)


def onnxscript(source: str, target: str) -> None:
    import onnx
    from onnxscript import optimizer

    onnx.save(optimizer.optimize(onnx.load(source)), target)


def onnxruntime(source: str, target: str) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = target
    options.log_severity_level = 4
    if Path(f"{source}.data").is_file():  # else the new file would look for its weights beside itself, in vain
        name = f"{Path(target).name}.data"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", name)
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def optimize_for_ort(source: str, target: str) -> None:
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort as optimize

    model, _ = optimize(onnx_ir.load(source))
    onnx_ir.external_data.load_to_model(model)
    onnx_ir.save(model, target)


def onnxruntime_transformers(source: str, target: str) -> None:
    from onnxruntime.transformers import optimizer

    family = "gpt2" if "gpt2" in source else "vit" if "vit" in source else "bert"
    optimizer.optimize_model(source, model_type=family).save_model_to_file(target)
