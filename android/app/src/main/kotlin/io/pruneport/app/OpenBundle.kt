// One bundle, open: photos are seen and questions answered one behind the other, by one thread.

package io.pruneport.app

import android.content.ContentResolver
import android.graphics.Bitmap
import android.graphics.Canvas
import android.graphics.Color
import android.graphics.ImageDecoder
import android.graphics.RectF
import android.net.Uri
import io.pruneport.core.Answers
import io.pruneport.core.AnswerTimes
import io.pruneport.core.Engine
import io.pruneport.core.Graphs
import io.pruneport.core.Manifest
import io.pruneport.core.Photo
import io.pruneport.core.Prompt
import io.pruneport.core.Tokenizer
import java.io.File

/** What the screen shows of a photo that was seen. */
internal class Seen(
    val readyMs: Double,
    /** Row by row, which image tokens were kept; null where no graph tells. */
    val kept: Set<Int>?,
    val rows: Int,
    val columns: Int,
    /** The part of the photo that the model sees, of 1 in both directions. */
    val part: RectF,
)

/** Opens the bundle in a folder. Throws Trouble. */
internal class OpenBundle(folder: File, engines: List<Engine>) : AutoCloseable {
    private val manifest = Manifest.read(folder)
    private val prompt = Prompt(Tokenizer.read(folder), manifest.prompt)
    private val graphs = Graphs.open(manifest, folder, engines)
    private val answers: Answers

    init {
        var whole = false
        try {
            answers = Answers(graphs)
            whole = true
        } finally {
            if (!whole) graphs.close()
        }
    }

    /** Of the last photo and question. */
    val times: AnswerTimes get() = answers.times

    /** Prefills a photo. Throws Trouble. */
    fun see(bitmap: Bitmap): Seen {
        val photo = photoOf(bitmap)
        answers.see(photo.pixelValues(manifest.image))
        val (top, left, height, width) = photo.seen(manifest.image)
        val part =
            RectF(
                (left / photo.width).toFloat(),
                (top / photo.height).toFloat(),
                ((left + width) / photo.width).toFloat(),
                ((top + height) / photo.height).toFloat(),
            )
        return Seen(answers.times.imageReady, answers.kept?.toSet(), manifest.prune.rows, manifest.prune.columns, part)
    }

    /** Answers about the photo; [say] gets each piece of text and stops the answer by giving false. Throws Trouble. */
    fun ask(question: String, say: (String) -> Boolean) {
        val ids = prompt.ids(question)
        val text = prompt.stream()
        val most = minOf(LONGEST_ANSWER, answers.room - ids.size + 1)
        answers.answer(ids, most) { say(text.append(it)) }
        say(text.finish())
    }

    override fun close() = graphs.close()

    private companion object {
        const val LONGEST_ANSWER = 200
    }
}

/** Larger photos are read smaller: no model looks at so many pixels. */
private const val MOST_PIXELS = 16_000_000L

/** A photo as it is looked at, turned upright, transparency laid on white. Throws IOException. */
internal fun readPhoto(resolver: ContentResolver, uri: Uri): Bitmap {
    val read =
        ImageDecoder.decodeBitmap(ImageDecoder.createSource(resolver, uri)) { decoder, info, _ ->
            decoder.setAllocator(ImageDecoder.ALLOCATOR_SOFTWARE)
            val (width, height) = info.size.width to info.size.height
            val pixels = width.toLong() * height
            if (pixels > MOST_PIXELS) {
                val scale = Math.sqrt(MOST_PIXELS.toDouble() / pixels)
                decoder.setTargetSize(maxOf(1, (width * scale).toInt()), maxOf(1, (height * scale).toInt()))
            }
        }
    if (!read.hasAlpha()) return read
    val opaque = Bitmap.createBitmap(read.width, read.height, Bitmap.Config.ARGB_8888)
    opaque.eraseColor(Color.WHITE)
    Canvas(opaque).drawBitmap(read, 0f, 0f, null)
    return opaque
}

private fun photoOf(bitmap: Bitmap): Photo {
    val (width, height) = bitmap.width to bitmap.height
    val pixels = ByteArray(width * height * 3)
    val row = IntArray(width)
    var at = 0
    for (y in 0 until height) {
        bitmap.getPixels(row, 0, width, 0, y, width, 1)
        for (colour in row) {
            pixels[at++] = Color.red(colour).toByte()
            pixels[at++] = Color.green(colour).toByte()
            pixels[at++] = Color.blue(colour).toByte()
        }
    }
    return Photo(height, width, pixels)
}
