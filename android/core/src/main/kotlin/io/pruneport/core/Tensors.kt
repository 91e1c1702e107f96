// Tensors where engines read them, and the safetensors files that hold them.

package io.pruneport.core

import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel

/** What the harness and the devices agree to exchange. */
enum class DType(val word: String, val size: Int, val stored: String) {
    FLOAT32("float32", 4, "F32"),
    FLOAT16("float16", 2, "F16"),
    INT64("int64", 8, "I64"),
    INT32("int32", 4, "I32"),
    INT8("int8", 1, "I8"),
    UINT8("uint8", 1, "U8"),
    BOOL("bool", 1, "BOOL"),
}

/**
 * A tensor in row-major order. It is a reference: a cache is written where it lies, and a view sees that.
 *
 * [bytes] is direct, little-endian, from 0 to its limit; engines read it where it lies.
 */
class Tensor private constructor(val dtype: DType, val shape: List<Int>, val bytes: ByteBuffer) {
    /** All zeros. Throws Trouble for a shape that no memory holds. */
    constructor(dtype: DType, shape: List<Int>) : this(dtype, shape, allocated(dtype, shape))

    val count: Int get() = bytes.capacity() / dtype.size

    /** A part of the memory from that byte on, under another shape. */
    private fun view(shape: List<Int>, from: Int, length: Int) = Tensor(dtype, shape, part(bytes, from, length))

    /** Rows of (1, T, ...): a view. Throws Trouble where there are fewer. */
    fun rows(from: Int, to: Int): Tensor {
        if (shape.size < 2 || shape[0] != 1 || from < 0 || from > to || to > shape[1]) {
            throw Trouble("a tensor of the shape $shape has no rows $from to $to")
        }
        val width = if (shape[1] == 0) 0 else bytes.capacity() / shape[1]
        return view(listOf(1, to - from) + shape.drop(2), from * width, (to - from) * width)
    }

    /** Entries of (1, H, n, d), copied. */
    fun entries(from: Int, to: Int): Tensor {
        if (shape.size != 4 || from > to) throw Trouble("a cache has four axes, not $shape")
        val made = Tensor(dtype, listOf(shape[0], shape[1], to - from, shape[3]))
        made.write(this, from, to, 0)
        return made
    }

    /** Writes entries of another cache (1, H, m, d) into this one (1, H, n, d), from [at] on. Throws Trouble. */
    fun write(source: Tensor, from: Int, to: Int, at: Int) {
        val of = source.shape
        val fits =
            shape.size == 4 && of.size == 4 && dtype == source.dtype && shape[0] == 1 && of[0] == 1 &&
                shape[1] == of[1] && shape[3] == of[3] && from in 0..to && to <= of[2] &&
                at >= 0 && at <= shape[2] - (to - from)
        if (!fits) {
            throw Trouble(
                "entries $from to $to of ${source.dtype.word} $of do not go into ${dtype.word} $shape at $at",
            )
        }
        val width = shape[3] * dtype.size
        val length = (to - from) * width
        if (length == 0) return
        val (reader, writer) = source.bytes.duplicate() to bytes.duplicate()
        for (head in 0 until shape[1]) {
            val start = (head * of[2] + from) * width
            span(reader, start, start + length)
            span(writer, (head * shape[2] + at) * width, bytes.capacity())
            writer.put(reader)
        }
    }

    /** The same in memory of its own. */
    fun copy(): Tensor {
        val made = Tensor(dtype, shape)
        made.bytes.duplicate().put(part(bytes, 0, bytes.capacity()))
        return made
    }

    /** All elements as float32 numbers. Throws Trouble for whole numbers. */
    fun floats(): FloatArray =
        when (dtype) {
            DType.FLOAT32 -> FloatArray(count).also { bytes.asFloatBuffer().get(it) }
            DType.FLOAT16 -> FloatArray(count) { widened(bytes.getShort(it * 2)) }
            else -> throw Trouble("${dtype.word} was found where floating-point numbers belong")
        }

    /** All elements, cut to whole numbers. Throws Trouble for what is not finite. */
    fun wholes(): LongArray =
        when (dtype) {
            DType.INT64 -> LongArray(count) { bytes.getLong(it * 8) }
            DType.INT32 -> LongArray(count) { bytes.getInt(it * 4).toLong() }
            DType.INT8 -> LongArray(count) { bytes.get(it).toLong() }
            DType.UINT8, DType.BOOL -> LongArray(count) { bytes.get(it).toLong() and 0xFF }
            DType.FLOAT32, DType.FLOAT16 -> {
                val numbers = floats()
                LongArray(count) {
                    if (Math.abs(numbers[it]) < TOO_LARGE) numbers[it].toLong() else notWhole(numbers[it])
                }
            }
        }

    private fun notWhole(number: Float): Nothing = throw Trouble("$number is no whole number")

    /** A copy of all bytes. */
    fun toByteArray(): ByteArray = ByteArray(bytes.capacity()).also { part(bytes, 0, bytes.capacity()).get(it) }

    companion object {
        /**
         * What gives memory for so many bytes: direct, all zeros. Throws OutOfMemoryError.
         *
         * On a computer Java's own direct buffers lie outside of its heap; on Android they lie in it, and it is small.
         */
        @Volatile var memory: (Int) -> ByteBuffer = ByteBuffer::allocateDirect

        private const val MOST = 1L shl 40
        private const val TOO_LARGE = 9.2e18f

        /** The number of elements. Throws Trouble for a negative size, or more than 2 to the 40. */
        fun count(shape: List<Int>): Long {
            var count = 1L
            for (size in shape) {
                if (size < 0 || (size > 0 && count > MOST / size)) {
                    throw Trouble("a tensor cannot have the shape $shape")
                }
                count *= size
            }
            return count
        }

        /** int64 or int32. Throws Trouble where not every element has a number. */
        fun ofWholes(dtype: DType, shape: List<Int>, wholes: List<Long>): Tensor {
            val made = Tensor(dtype, shape)
            if (wholes.size != made.count) throw Trouble("${wholes.size} numbers do not fill the shape $shape")
            for ((at, whole) in wholes.withIndex()) {
                when (dtype) {
                    DType.INT64 -> made.bytes.putLong(at * 8, whole)
                    DType.INT32 -> {
                        if (whole != whole.toInt().toLong()) throw Trouble("$whole is no int32")
                        made.bytes.putInt(at * 4, whole.toInt())
                    }
                    else -> throw Trouble("whole numbers are int64 or int32, not ${dtype.word}")
                }
            }
            return made
        }

        /** float32. Throws Trouble where not every element has a number. */
        fun ofFloats(shape: List<Int>, floats: FloatArray): Tensor {
            val made = Tensor(DType.FLOAT32, shape)
            if (floats.size != made.count) throw Trouble("${floats.size} numbers do not fill the shape $shape")
            made.bytes.asFloatBuffer().put(floats)
            return made
        }

        /** Any dtype, byte by byte. Throws Trouble where there are more or fewer than it takes. */
        fun ofBytes(dtype: DType, shape: List<Int>, content: ByteArray): Tensor {
            val made = Tensor(dtype, shape)
            if (content.size != made.bytes.capacity()) {
                throw Trouble("${content.size} bytes do not fill the shape $shape")
            }
            made.bytes.duplicate().put(content)
            return made
        }

        /** What an engine gave, where it lies, from the buffer's position to its limit. Throws Trouble. */
        fun over(dtype: DType, shape: List<Int>, buffer: ByteBuffer): Tensor {
            if (buffer.remaining().toLong() != count(shape) * dtype.size) {
                throw Trouble("${buffer.remaining()} bytes do not fill the shape $shape")
            }
            return Tensor(dtype, shape, buffer.slice().order(ByteOrder.LITTLE_ENDIAN))
        }

        private fun allocated(dtype: DType, shape: List<Int>): ByteBuffer {
            val size = count(shape) * dtype.size
            if (size > Int.MAX_VALUE) throw Trouble("no memory for a tensor of $size bytes")
            try {
                return memory(size.toInt()).order(ByteOrder.LITTLE_ENDIAN)
            } catch (_: OutOfMemoryError) {
                throw Trouble("no memory for a tensor of $size bytes")
            }
        }

        private fun part(bytes: ByteBuffer, from: Int, length: Int): ByteBuffer {
            val whole = bytes.duplicate()
            span(whole, from, from + length)
            return whole.slice().order(ByteOrder.LITTLE_ENDIAN)
        }

        /** By the class that older systems have these methods in. */
        private fun span(buffer: Buffer, from: Int, to: Int) {
            buffer.clear()
            buffer.limit(to)
            buffer.position(from)
        }

        /** The number that 16 bits stand for. */
        fun widened(bits: Short): Float {
            val whole = bits.toInt() and 0xFFFF
            val sign = whole and 0x8000 shl 16
            val exponent = whole shr 10 and 0x1F
            val fraction = whole and 0x3FF
            if (exponent == 0) {
                val small = fraction * (1f / (1 shl 24))
                return if (sign == 0) small else -small
            }
            val wide = if (exponent == 0x1F) 0xFF else exponent + 112
            return java.lang.Float.intBitsToFloat(sign or (wide shl 23) or (fraction shl 13))
        }
    }
}

/** Files of named tensors. */
object Safetensors {
    private const val LONGEST_HEADER = 16 shl 20

    /** All tensors of a file, by name, mapped into memory to be read only. Throws Trouble. */
    fun read(file: File): Map<String, Tensor> {
        val name = file.name
        if (!file.exists()) throw Trouble("$name cannot be read")
        if (!file.isFile) throw Trouble("$name is no plain file")
        try {
            RandomAccessFile(file, "r").use { return read(it, name) }
        } catch (error: IOException) {
            throw Trouble("$name cannot be read: ${error.message}")
        }
    }

    private fun read(file: RandomAccessFile, name: String): Map<String, Tensor> {
        val size = file.length()
        if (size < 8) throw Trouble("$name is no safetensors file")
        val length = java.lang.Long.reverseBytes(file.readLong())
        if (length < 0 || length > size - 8) throw Trouble("$name is truncated")
        if (length > LONGEST_HEADER) throw Trouble("$name has a header of $length bytes")
        val raw = ByteArray(length.toInt())
        file.readFully(raw)
        val header = Json.parse(raw, "the header of $name") as? Json.Members ?: throw Trouble("$name has no header")
        val start = 8 + length
        val tensors = LinkedHashMap<String, Tensor>()
        for ((key, value) in header.values) {
            if (key == "__metadata__") continue
            val place = "$name: ${key.take(200)}"
            val fields = Fields(value, place)
            val stored = fields.text("dtype")
            val dtype =
                DType.entries.firstOrNull { it.stored == stored }
                    ?: throw Trouble("$place is of the dtype $stored, which is not exchanged")
            val shape = fields.wholes("shape", 0..Int.MAX_VALUE)
            val offsets = fields.longs("data_offsets", 0..Long.MAX_VALUE)
            if (offsets.size != 2 || offsets[0] > offsets[1] || offsets[1] > size - start) {
                throw Trouble("$place lies outside of the file")
            }
            val taken = offsets[1] - offsets[0]
            if (taken != Tensor.count(shape) * dtype.size) {
                throw Trouble("$place has not as many bytes as its shape $shape takes")
            }
            if (taken > Int.MAX_VALUE) throw Trouble("$place has $taken bytes, which is too much")
            tensors[key] =
                if (taken == 0L) {
                    Tensor(dtype, shape)
                } else {
                    val mapped = file.channel.map(FileChannel.MapMode.READ_ONLY, start + offsets[0], taken)
                    Tensor.over(dtype, shape, mapped)
                }
        }
        return tensors
    }

    /** Writes a file. Throws Trouble. */
    fun write(tensors: Map<String, Tensor>, file: File) {
        // The widest first, so that all of them lie at addresses that are whole numbers of their size.
        val ordered = tensors.entries.sortedWith(compareBy({ -it.value.dtype.size }, { it.key }))
        val header = LinkedHashMap<String, Json>()
        var end = 0L
        for ((name, tensor) in ordered) {
            val next = end + tensor.bytes.capacity()
            header[name] =
                Json.of(
                    "dtype" to Json.Text(tensor.dtype.stored),
                    "shape" to Json.Items(tensor.shape.map { Json.Whole(it.toLong()) }),
                    "data_offsets" to Json.Items(listOf(Json.Whole(end), Json.Whole(next))),
                )
            end = next
        }
        val bare = Json.Members(header).compact().toByteArray(Charsets.UTF_8)
        val text = bare + ByteArray((8 - bare.size % 8) % 8) { ' '.code.toByte() }
        try {
            FileOutputStream(file).use { stream ->
                stream.write(ByteArray(8) { (text.size.toLong() shr (8 * it)).toByte() })
                stream.write(text)
                for ((_, tensor) in ordered) {
                    val rest = tensor.bytes.duplicate()
                    while (rest.hasRemaining()) stream.channel.write(rest)
                }
            }
        } catch (error: IOException) {
            throw Trouble("${file.name} cannot be written: ${error.message}; is the device full?")
        }
    }
}
