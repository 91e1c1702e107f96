// Android's decoder of pictures, which came with API 28: the signatures that the app uses, and no more.

package android.graphics;

import android.content.ContentResolver;
import android.net.Uri;
import android.util.Size;
import java.io.IOException;

public final class ImageDecoder implements AutoCloseable {
    public static final int ALLOCATOR_SOFTWARE = 1;

    private ImageDecoder() {}

    public abstract static class Source {
        private Source() {}
    }

    public static class ImageInfo {
        private ImageInfo() {}

        public Size getSize() {
            throw new UnsupportedOperationException();
        }
    }

    public interface OnHeaderDecodedListener {
        void onHeaderDecoded(ImageDecoder decoder, ImageInfo info, Source source);
    }

    public static Source createSource(ContentResolver cr, Uri uri) {
        throw new UnsupportedOperationException();
    }

    public static Bitmap decodeBitmap(Source src, OnHeaderDecodedListener listener) throws IOException {
        throw new UnsupportedOperationException();
    }

    public void setAllocator(int allocator) {
        throw new UnsupportedOperationException();
    }

    public void setTargetSize(int width, int height) {
        throw new UnsupportedOperationException();
    }

    @Override
    public void close() {
        throw new UnsupportedOperationException();
    }
}
