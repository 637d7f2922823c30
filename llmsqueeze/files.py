"""The names that files have in a model folder."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDECAR = "llmsqueeze.json"  # what was done: recipe, calibration, sizes, errors
EVALUATION = "evaluation.json"  # the last scores that `llmsqueeze eval` measured
TEMPLATES = "additional_chat_templates"

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OTHER_WEIGHTS = ("*.bin.index.json", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite", "*.npz", "*.mlmodel")
