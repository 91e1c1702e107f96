// What ONNX Runtime tells of a value.

package ai.onnxruntime;

public interface ValueInfo {}
