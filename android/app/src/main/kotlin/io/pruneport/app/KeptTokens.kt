// The photo on the screen, dark where the model sees nothing of it any more.

package io.pruneport.app

import android.content.Context
import android.graphics.Bitmap
import android.graphics.Canvas
import android.graphics.Paint
import android.graphics.RectF
import android.view.View

/** Draws a photo as wide as it may be, and the image tokens that were dropped over it. */
internal class KeptTokens(context: Context) : View(context) {
    private val dark = Paint().apply { color = DARK }
    private val smooth = Paint(Paint.FILTER_BITMAP_FLAG)
    private var photo: Bitmap? = null
    private var seen: Seen? = null

    fun show(photo: Bitmap?, seen: Seen?) {
        this.photo = photo
        this.seen = seen
        requestLayout()
        invalidate()
    }

    override fun onMeasure(widthMeasureSpec: Int, heightMeasureSpec: Int) {
        val width = MeasureSpec.getSize(widthMeasureSpec)
        val shown = photo
        val height = if (shown == null) 0 else (width.toLong() * shown.height / shown.width).toInt()
        setMeasuredDimension(width, minOf(height, width * HIGHEST))
    }

    override fun onDraw(canvas: Canvas) {
        super.onDraw(canvas)
        val shown = photo ?: return
        val scale = minOf(width.toFloat() / shown.width, height.toFloat() / shown.height)
        val (wide, high) = shown.width * scale to shown.height * scale
        val left = (width - wide) / 2
        canvas.drawBitmap(shown, null, RectF(left, 0f, left + wide, high), smooth)
        val told = seen ?: return
        val kept = told.kept ?: return
        val cellWidth = told.part.width() * wide / told.columns
        val cellHeight = told.part.height() * high / told.rows
        for (token in 0 until told.rows * told.columns) {
            if (token in kept) continue
            val x = left + told.part.left * wide + token % told.columns * cellWidth
            val y = told.part.top * high + token / told.columns * cellHeight
            canvas.drawRect(x, y, x + cellWidth, y + cellHeight, dark)
        }
    }

    private companion object {
        const val DARK = 0xA6000000.toInt()

        /** A photo on end takes at most so many times its width. */
        const val HIGHEST = 2
    }
}
