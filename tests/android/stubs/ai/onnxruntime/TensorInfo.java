// Type and shape of ONNX Runtime's tensors.

package ai.onnxruntime;

public class TensorInfo implements ValueInfo {
    public final OnnxJavaType type;

    TensorInfo(OnnxJavaType type) {
        this.type = type;
    }

    public long[] getShape() {
        throw new UnsupportedOperationException();
    }
}
