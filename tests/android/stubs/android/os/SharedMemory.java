// Android's anonymous shared memory, which came with API 27: the signatures that the app uses, and no more.

package android.os;

import android.system.ErrnoException;
import java.io.Closeable;
import java.nio.ByteBuffer;

public final class SharedMemory implements Closeable {
    private SharedMemory() {}

    public static SharedMemory create(String name, int size) throws ErrnoException {
        throw new UnsupportedOperationException();
    }

    public ByteBuffer mapReadWrite() throws ErrnoException {
        throw new UnsupportedOperationException();
    }

    @Override
    public void close() {
        throw new UnsupportedOperationException();
    }
}
