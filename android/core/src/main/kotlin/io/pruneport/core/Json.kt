// JSON that trusts nothing: read with limits, its fields taken by name and kind, everything unusual an error.

package io.pruneport.core

import java.io.ByteArrayOutputStream
import java.io.File
import java.io.FileInputStream
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException
import java.nio.charset.CodingErrorAction

/** What went wrong, in words for whoever reads the findings; [missing]: something is lacking rather than broken. */
class Trouble(override val message: String, val missing: Boolean = false) : Exception(message)

/** One value of a JSON document. Whole numbers that fit 64 bits are [Whole], all other finite ones [Real]. */
sealed class Json {
    object Null : Json()

    data class Flag(val value: Boolean) : Json()

    data class Whole(val value: Long) : Json()

    data class Real(val value: Double) : Json()

    data class Text(val value: String) : Json()

    data class Items(val values: List<Json>) : Json()

    /** Members in their order. */
    data class Members(val values: Map<String, Json>) : Json()

    /** The document, spread over lines. Throws Trouble for a number that JSON cannot hold. */
    fun written(): String = StringBuilder().also { write(it, "\n") }.append('\n').toString()

    /** The document on one line. Throws Trouble for a number that JSON cannot hold. */
    fun compact(): String = StringBuilder().also { write(it, "") }.toString()

    /** [line] is what begins a line here; empty for no lines at all. */
    private fun write(to: StringBuilder, line: String) {
        when (this) {
            is Null -> to.append("null")
            is Flag -> to.append(value)
            is Whole -> to.append(value)
            is Real -> {
                if (value.isNaN() || value.isInfinite()) throw Trouble("$value cannot be written as JSON")
                to.append(value)
            }
            is Text -> quote(value, to)
            is Items -> {
                // Numbers stay on one line: there may be thousands.
                val flat = values.all { it is Whole || it is Real }
                enclose(to, '[', ']', values, if (flat) "" else line) { value, inner -> value.write(to, inner) }
            }
            is Members ->
                enclose(to, '{', '}', values.entries, line) { (name, value), inner ->
                    quote(name, to)
                    to.append(": ")
                    value.write(to, inner)
                }
        }
    }

    companion object {
        private const val DEEPEST = 64

        /** Reads a file of at most [limit] bytes. Throws Trouble. */
        fun read(file: File, limit: Int): Json = parse(bytes(file, limit), file.name)

        /** Throws Trouble for anything but one whole document of JSON in UTF-8; [name] is what errors call it. */
        fun parse(bytes: ByteArray, name: String): Json = JsonReader(bytes, name, DEEPEST).document()

        fun parse(text: String, name: String): Json = parse(text.toByteArray(Charsets.UTF_8), name)

        fun of(vararg members: Pair<String, Json>): Json = Members(linkedMapOf(*members))

        fun numbers(values: List<Double>): Json = Items(values.map(::Real))

        private fun bytes(file: File, limit: Int): ByteArray {
            try {
                FileInputStream(file).use { stream ->
                    val made = ByteArrayOutputStream()
                    val some = ByteArray(1 shl 16)
                    while (true) {
                        val count = stream.read(some)
                        if (count < 0) return made.toByteArray()
                        if (made.size() > limit - count) throw Trouble("${file.name} has more than $limit bytes")
                        made.write(some, 0, count)
                    }
                }
            } catch (_: IOException) {
                throw Trouble("${file.name} cannot be read")
            }
        }

        private fun <T> enclose(
            to: StringBuilder,
            open: Char,
            close: Char,
            all: Collection<T>,
            line: String,
            each: (T, String) -> Unit,
        ) {
            val inner = if (line.isEmpty()) "" else "$line  "
            to.append(open)
            for ((number, one) in all.withIndex()) {
                if (number > 0) to.append(if (inner.isEmpty()) ", " else ",")
                to.append(inner)
                each(one, inner)
            }
            if (all.isNotEmpty()) to.append(line)
            to.append(close)
        }

        private fun quote(text: String, to: StringBuilder) {
            to.append('"')
            for ((at, char) in text.withIndex()) {
                when {
                    char == '"' || char == '\\' -> to.append('\\').append(char)
                    char == '\n' -> to.append("\\n")
                    char < ' ' -> to.append("\\u").append(char.code.toString(16).padStart(4, '0'))
                    char.isSurrogate() && !isWhole(text, at) -> to.append('\uFFFD')
                    else -> to.append(char)
                }
            }
            to.append('"')
        }

        /** Whether the surrogate there has its other half. */
        private fun isWhole(text: String, at: Int): Boolean =
            if (text[at].isHighSurrogate()) {
                at + 1 < text.length && text[at + 1].isLowSurrogate()
            } else {
                at > 0 && text[at - 1].isHighSurrogate()
            }
    }
}

private class JsonReader(private val bytes: ByteArray, private val name: String, private val deepest: Int) {
    private var at = 0

    fun document(): Json {
        val value = value(0)
        skipSpace()
        if (at < bytes.size) throw wrong("has something behind its end")
        return value
    }

    private fun wrong(what: String) = Trouble("$name $what at byte $at")

    private fun peek(): Char = if (at < bytes.size) (bytes[at].toInt() and 0xFF).toChar() else '\uFFFF'

    private fun take(char: Char): Boolean = (peek() == char).also { if (it) at += 1 }

    private fun skipSpace() {
        while (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r') at += 1
    }

    private fun word(word: String, value: Json): Json {
        for (char in word) if (!take(char)) throw wrong("is no JSON")
        return value
    }

    private fun value(depth: Int): Json {
        if (depth > deepest) throw wrong("is nested too deeply")
        skipSpace()
        if (at == bytes.size) throw wrong("ends too early")
        return when (peek()) {
            '{' -> members(depth)
            '[' -> items(depth)
            '"' -> Json.Text(text())
            't' -> word("true", Json.Flag(true))
            'f' -> word("false", Json.Flag(false))
            'n' -> word("null", Json.Null)
            else -> number()
        }
    }

    private fun members(depth: Int): Json {
        at += 1
        val values = LinkedHashMap<String, Json>()
        skipSpace()
        if (take('}')) return Json.Members(values)
        while (true) {
            skipSpace()
            if (peek() != '"') throw wrong("lacks a name")
            val name = text()
            if (name in values) throw wrong("names ${name.take(100)} twice")
            skipSpace()
            if (!take(':')) throw wrong("lacks a colon")
            values[name] = value(depth + 1)
            skipSpace()
            if (take('}')) return Json.Members(values)
            if (!take(',')) throw wrong("lacks a comma or a brace")
        }
    }

    private fun items(depth: Int): Json {
        at += 1
        val values = ArrayList<Json>()
        skipSpace()
        if (take(']')) return Json.Items(values)
        while (true) {
            values += value(depth + 1)
            skipSpace()
            if (take(']')) return Json.Items(values)
            if (!take(',')) throw wrong("lacks a comma or a bracket")
        }
    }

    private fun digits(): Int {
        val start = at
        while (peek() in '0'..'9') at += 1
        return at - start
    }

    private fun number(): Json {
        val start = at
        var isWhole = true
        take('-')
        val leading = peek()
        val count = digits()
        if (count == 0 || (count > 1 && leading == '0')) throw wrong("is no JSON")
        if (take('.')) {
            isWhole = false
            if (digits() == 0) throw wrong("has a number without its end")
        }
        if (take('e') || take('E')) {
            isWhole = false
            if (!take('+')) take('-')
            if (digits() == 0) throw wrong("has a number without its end")
        }
        val written = String(bytes, start, at - start, Charsets.US_ASCII)
        val whole = if (isWhole) written.toLongOrNull() else null
        if (whole != null) return Json.Whole(whole)
        val real = written.toDouble()
        if (real.isInfinite()) throw wrong("has a number beyond all bounds")
        return Json.Real(real)
    }

    private fun text(): String {
        at += 1
        val made = StringBuilder()
        var start = at
        while (true) {
            if (at == bytes.size) throw wrong("has a text without an end")
            val char = peek()
            when {
                char == '"' -> {
                    made.append(decoded(start))
                    at += 1
                    return made.toString()
                }
                char == '\\' -> {
                    made.append(decoded(start))
                    at += 1
                    escape(made)
                    start = at
                }
                char < ' ' -> throw wrong("has a control character in a text")
                else -> at += 1
            }
        }
    }

    /** The bytes up to here. */
    private fun decoded(start: Int): CharSequence {
        val decoder = Charsets.UTF_8.newDecoder()
        decoder.onMalformedInput(CodingErrorAction.REPORT).onUnmappableCharacter(CodingErrorAction.REPORT)
        try {
            return decoder.decode(ByteBuffer.wrap(bytes, start, at - start))
        } catch (_: CharacterCodingException) {
            throw wrong("has a text that is not UTF-8")
        }
    }

    private fun escape(made: StringBuilder) {
        if (at == bytes.size) throw wrong("has a text without an end")
        val plain = "\"\\/bfnrt".indexOf(peek())
        if (plain >= 0) {
            made.append("\"\\/\b\u000C\n\r\t"[plain])
            at += 1
            return
        }
        if (!take('u')) throw wrong("has an unknown escape")
        val first = hex()
        made.append(first)
        if (first.isLowSurrogate()) throw wrong("has half a character")
        if (!first.isHighSurrogate()) return
        if (!take('\\') || !take('u')) throw wrong("has half a character")
        val second = hex()
        if (!second.isLowSurrogate()) throw wrong("has half a character")
        made.append(second)
    }

    private fun hex(): Char {
        if (bytes.size - at < 4) throw wrong("has a text without an end")
        var code = 0
        repeat(4) {
            val char = peek()
            val digit = if (char < '\u0080') Character.digit(char, 16) else -1
            if (digit < 0) throw wrong("has an unknown escape")
            code = code shl 4 or digit
            at += 1
        }
        return code.toChar()
    }
}

/** The fields of one object of JSON, taken by name and kind; every error tells where. */
class Fields private constructor(val place: String, private val values: Map<String, Json>) {
    /** [only] are the names there may be; null allows any. Throws Trouble. */
    constructor(json: Json, place: String, only: Set<String>? = null) : this(place, membersOf(json, place, only))

    private fun wrong(name: String, what: String) = Trouble("$place.$name $what")

    /** The value of a field; null where it is missing or null. */
    fun optional(name: String): Json? = values[name].takeUnless { it is Json.Null }

    fun value(name: String): Json = optional(name) ?: throw wrong(name, "is missing")

    fun fields(name: String, only: Set<String>? = null) = Fields(value(name), "$place.$name", only)

    fun optionalFields(name: String, only: Set<String>? = null): Fields? =
        optional(name)?.let { Fields(it, "$place.$name", only) }

    fun text(name: String, default: String? = null, longest: Int = 1 shl 20): String {
        val value = optional(name) ?: default?.let { Json.Text(it) } ?: throw wrong(name, "is missing")
        if (value !is Json.Text) throw wrong(name, "is no text")
        if (value.value.length > longest) throw wrong(name, "has more than $longest characters")
        return value.value
    }

    /** A text of 1 to 256 characters. */
    fun name(name: String): String {
        val found = text(name)
        if (found.codePointCount(0, found.length) !in 1..256) throw wrong(name, "has not 1 to 256 characters")
        return found
    }

    fun flag(name: String, default: Boolean? = null): Boolean {
        val value = optional(name) ?: default?.let { Json.Flag(it) } ?: throw wrong(name, "is missing")
        return (value as? Json.Flag ?: throw wrong(name, "is neither true nor false")).value
    }

    fun whole(name: String, range: IntRange, default: Int? = null): Int =
        long(name, range.first.toLong()..range.last, default?.toLong()).toInt()

    fun long(name: String, range: LongRange, default: Long? = null): Long {
        val value = optional(name) ?: default?.let { Json.Whole(it) } ?: throw wrong(name, "is missing")
        return long(value, range, "$place.$name")
    }

    fun number(name: String, range: ClosedRange<Double>, default: Double? = null): Double {
        val value = optional(name) ?: default?.let { Json.Real(it) } ?: throw wrong(name, "is missing")
        return number(value, range, "$place.$name")
    }

    fun list(name: String, longest: Int = 1 shl 20): List<Json> {
        val value = value(name) as? Json.Items ?: throw wrong(name, "is no list")
        if (value.values.size > longest) throw wrong(name, "has more than $longest entries")
        return value.values
    }

    /** A list that is empty where it is missing. */
    fun optionalList(name: String, longest: Int = 1 shl 20): List<Json> =
        if (optional(name) == null) emptyList() else list(name, longest)

    fun members(name: String): Map<String, Json> =
        (value(name) as? Json.Members ?: throw wrong(name, "is no object")).values

    fun wholes(name: String, range: IntRange): List<Int> =
        list(name).map { long(it, range.first.toLong()..range.last, "$place.$name[]").toInt() }

    fun optionalWholes(name: String, range: IntRange): List<Int> =
        if (optional(name) == null) emptyList() else wholes(name, range)

    fun longs(name: String, range: LongRange): List<Long> = list(name).map { long(it, range, "$place.$name[]") }

    fun numbers(name: String, range: ClosedRange<Double>, count: Int): List<Double> {
        val values = list(name)
        if (values.size != count) throw wrong(name, "has ${values.size} entries, not $count")
        return values.map { number(it, range, "$place.$name[]") }
    }

    fun texts(name: String): List<String> =
        optionalList(name).map { (it as? Json.Text ?: throw wrong(name, "holds something that is no text")).value }

    /** What [make] makes of each object of a list. */
    fun <T> objects(name: String, make: (Json, String) -> T): List<T> =
        list(name).mapIndexed { number, json -> make(json, "$place.$name[$number]") }

    fun <T> optionalObjects(name: String, make: (Json, String) -> T): List<T> =
        if (optional(name) == null) emptyList() else objects(name, make)

    companion object {
        private fun membersOf(json: Json, place: String, only: Set<String>?): Map<String, Json> {
            val values = (json as? Json.Members ?: throw Trouble("$place is no object")).values
            val odd = if (only == null) null else values.keys.firstOrNull { it !in only }
            if (odd != null) throw Trouble("$place has the unknown field ${odd.take(100)}")
            return values
        }

        private fun long(value: Json, range: LongRange, place: String): Long {
            val found = (value as? Json.Whole ?: throw Trouble("$place is no whole number")).value
            if (found !in range) throw Trouble("$place is $found, not in $range")
            return found
        }

        private fun number(value: Json, range: ClosedRange<Double>, place: String): Double {
            val found =
                when (value) {
                    is Json.Whole -> value.value.toDouble()
                    is Json.Real -> value.value
                    else -> throw Trouble("$place is no number")
                }
            if (found !in range) throw Trouble("$place is $found, not in $range")
            return found
        }
    }
}
