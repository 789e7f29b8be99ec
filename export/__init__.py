"""From a model to a serving engine: ONNX graphs, TensorRT engines and one session that runs them."""
