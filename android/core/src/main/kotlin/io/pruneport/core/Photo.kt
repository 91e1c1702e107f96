// From a photo to the pixel values that a vision graph reads, resized as Pillow does it, to within a grey level.

package io.pruneport.core

/** A photo as the camera sees it: rows of red, green and blue, a byte each. Throws Trouble for one out of bounds. */
class Photo(val height: Int, val width: Int, val pixels: ByteArray) {
    init {
        if (height < 1 || width < 1 || height.toLong() * width > MOST_PIXELS) {
            throw Trouble("the photo is $width x $height; it may have at most 128 megapixels")
        }
        if (pixels.size != height * width * 3) throw Trouble("the photo has not three bytes for each pixel")
        if (maxOf(height, width).toLong() > LONGEST_SIDE * minOf(height, width).toLong()) {
            throw Trouble("the photo is $width x $height; its long side may be at most $LONGEST_SIDE times the short")
        }
    }

    /** What the model looks at: resized and cropped to the height and width of [info]. */
    fun view(info: ImageInfo): Photo {
        var newHeight = info.height
        var newWidth = info.width
        if (info.centreCrop) {
            // The long side is cut off to a whole pixel, not rounded, as CLIP's preprocessor does it.
            val other = (info.resizeShortest.toLong() * maxOf(height, width) / minOf(height, width)).toInt()
            newHeight = if (height <= width) info.resizeShortest else other
            newWidth = if (height <= width) other else info.resizeShortest
        }
        // Only what the crop shows is computed.
        val across = taps(width, newWidth, (newWidth - info.width) / 2, info.width, info.resample)
        val down = taps(height, newHeight, (newHeight - info.height) / 2, info.height, info.resample)
        val first = down.minOf { it.first }
        val last = down.maxOf { it.first + it.weights.size }
        if ((last - first).toLong() * info.width * 3 > Int.MAX_VALUE) {
            throw Trouble("the photo is $width x $height; resizing it takes more memory than there is")
        }
        val wide = resizedRows(across, first, last)
        return Photo(info.height, info.width, resizedColumns(wide, info.width * 3, down, first))
    }

    /** float32 (1, 3, height, width), normalised. */
    fun pixelValues(info: ImageInfo): Tensor {
        val seen = view(info).pixels
        val area = info.height * info.width
        val values = FloatArray(3 * area)
        for (channel in 0 until 3) {
            for (place in 0 until area) {
                val scaled = (seen[place * 3 + channel].toInt() and 0xFF) * info.rescale
                values[channel * area + place] = (scaled - info.mean[channel]) / info.std[channel]
            }
        }
        return Tensor.ofFloats(listOf(1, 3, info.height, info.width), values)
    }

    /** The part of the photo that [view] shows, in its own pixels: top, left, height, width. */
    fun seen(info: ImageInfo): DoubleArray {
        if (!info.centreCrop) return doubleArrayOf(0.0, 0.0, height.toDouble(), width.toDouble())
        val scale = minOf(height, width).toDouble() / info.resizeShortest
        val (high, wide) = info.height * scale to info.width * scale
        return doubleArrayOf((height - high) / 2, (width - wide) / 2, high, wide)
    }

    /** Rows [from] to [to] of (height, width, 3), each with as many pixels as there are taps. */
    private fun resizedRows(all: List<Taps>, from: Int, to: Int): ByteArray {
        val out = ByteArray((to - from) * all.size * 3)
        var end = 0
        for (y in from until to) {
            for (taps in all) {
                for (channel in 0 until 3) {
                    var sum = HALF
                    var at = (y * width + taps.first) * 3 + channel
                    for (weight in taps.weights) {
                        sum += weight.toLong() * (pixels[at].toInt() and 0xFF)
                        at += 3
                    }
                    out[end++] = level(sum)
                }
            }
        }
        return out
    }

    /** Of rows of [stride] bytes, the first of which is row [from], as many as there are taps. */
    private fun resizedColumns(rows: ByteArray, stride: Int, all: List<Taps>, from: Int): ByteArray {
        val out = ByteArray(all.size * stride)
        var end = 0
        for (taps in all) {
            for (x in 0 until stride) {
                var sum = HALF
                var at = (taps.first - from) * stride + x
                for (weight in taps.weights) {
                    sum += weight.toLong() * (rows[at].toInt() and 0xFF)
                    at += stride
                }
                out[end++] = level(sum)
            }
        }
        return out
    }

    companion object {
        const val MOST_PIXELS = 128_000_000L
        private const val LONGEST_SIDE = 50

        /** From uint8 (H, W, 3). Throws Trouble. */
        fun of(tensor: Tensor): Photo {
            if (tensor.dtype != DType.UINT8 || tensor.shape.size != 3 || tensor.shape[2] != 3) {
                throw Trouble("the photo is ${tensor.dtype.word} ${tensor.shape}, not uint8 (H, W, 3)")
            }
            return Photo(tensor.shape[0], tensor.shape[1], tensor.toByteArray())
        }
    }
}

// Weights are whole numbers of this fraction: what is left of 32 bits beside 8 of a sample and 2 for a sum beyond it.
private const val BITS = 32 - 8 - 2
private const val HALF = 1L shl (BITS - 1)

private fun level(sum: Long): Byte = (sum shr BITS).coerceIn(0, 255).toByte()

/** Of one output sample: where its input samples begin, and their weights. */
private class Taps(val first: Int, val weights: IntArray)

/** Of [count] output samples from [start] on. */
private fun taps(from: Int, to: Int, start: Int, count: Int, resample: Resample): List<Taps> {
    val wanted = start until start + count
    // Pillow leaves alone what has its size already.
    if (from == to) return wanted.map { Taps(it, intArrayOf(1 shl BITS)) }
    val scale = from.toDouble() / to
    if (resample == Resample.NEAREST) {
        return wanted.map { Taps(minOf(from - 1, ((it + 0.5) * scale).toInt()), intArrayOf(1 shl BITS)) }
    }
    val stretch = maxOf(scale, 1.0)
    val reach = reach(resample) * stretch
    return wanted.map { place ->
        val centre = (place + 0.5) * scale
        val first = maxOf(0, (centre - reach + 0.5).toInt())
        val last = minOf(from, (centre + reach + 0.5).toInt())
        val exact = DoubleArray(last - first) { weight((first + it - centre + 0.5) / stretch, resample) }
        var sum = 0.0
        for (part in exact) sum += part
        val weights =
            IntArray(exact.size) {
                val scaled = (if (sum != 0.0) exact[it] / sum else exact[it]) * (1 shl BITS)
                (if (scaled < 0) scaled - 0.5 else scaled + 0.5).toInt()
            }
        Taps(first, weights)
    }
}

private fun reach(resample: Resample): Double =
    when (resample) {
        Resample.NEAREST -> 0.0
        Resample.BILINEAR -> 1.0
        Resample.BICUBIC -> 2.0
        Resample.LANCZOS -> 3.0
    }

/** The weight of a sample at a distance. */
private fun weight(distance: Double, resample: Resample): Double {
    val x = Math.abs(distance)
    return when (resample) {
        Resample.NEAREST -> 1.0
        Resample.BILINEAR -> maxOf(0.0, 1 - x)
        Resample.BICUBIC -> {
            val a = -0.5
            when {
                x < 1 -> ((a + 2) * x - (a + 3)) * x * x + 1
                x < 2 -> (((x - 5) * x + 8) * x - 4) * a
                else -> 0.0
            }
        }
        Resample.LANCZOS -> if (x < 3) sinc(x) * sinc(x / 3) else 0.0
    }
}

private fun sinc(x: Double): Double = if (x == 0.0) 1.0 else Math.sin(x * Math.PI) / (x * Math.PI)
