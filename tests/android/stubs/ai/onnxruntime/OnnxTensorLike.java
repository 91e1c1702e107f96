// What a session of ONNX Runtime's takes.

package ai.onnxruntime;

public abstract class OnnxTensorLike implements OnnxValue {
    OnnxTensorLike() {}

    @Override
    public TensorInfo getInfo() {
        throw new UnsupportedOperationException();
    }
}
