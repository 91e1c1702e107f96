// The one file that a camera app may write: the photo that this app asked it for.

package io.pruneport.app

import android.content.ContentProvider
import android.content.ContentValues
import android.content.Context
import android.database.Cursor
import android.net.Uri
import android.os.ParcelFileDescriptor
import java.io.File
import java.io.FileNotFoundException

/** Hands out that file and nothing else; others get at it only with a grant in the intent that asks for a photo. */
class CameraFile : ContentProvider() {
    override fun onCreate() = true

    override fun openFile(uri: Uri, mode: String): ParcelFileDescriptor {
        val here = context
        if (here == null || uri != URI) throw FileNotFoundException("there is no $uri")
        return ParcelFileDescriptor.open(file(here), ParcelFileDescriptor.parseMode(mode))
    }

    override fun getType(uri: Uri) = "image/jpeg"

    override fun query(
        uri: Uri,
        projection: Array<String>?,
        selection: String?,
        selectionArgs: Array<String>?,
        sortOrder: String?,
    ): Cursor? = null

    override fun insert(uri: Uri, values: ContentValues?): Uri? = null

    override fun update(uri: Uri, values: ContentValues?, selection: String?, selectionArgs: Array<String>?) = 0

    override fun delete(uri: Uri, selection: String?, selectionArgs: Array<String>?) = 0

    internal companion object {
        val URI: Uri = Uri.parse("content://io.pruneport.app.camera/photo")

        fun file(context: Context) = File(context.cacheDir, "camera.jpg")
    }
}
