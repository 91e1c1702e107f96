// What a session of ONNX Runtime's gives.

package ai.onnxruntime;

public interface OnnxValue extends AutoCloseable {
    ValueInfo getInfo();

    @Override
    void close();
}
