// ONNX Runtime's environment: the signatures that the app uses, and no more.

package ai.onnxruntime;

public final class OrtEnvironment implements AutoCloseable {
    private OrtEnvironment() {}

    public static synchronized OrtEnvironment getEnvironment() {
        throw new UnsupportedOperationException();
    }

    public OrtSession createSession(String modelPath, OrtSession.SessionOptions options) throws OrtException {
        throw new UnsupportedOperationException();
    }

    @Override
    public void close() {
        throw new UnsupportedOperationException();
    }
}
