// Text to token ids and back, as a tokenizer.json says; a kind of step that is not known here is refused by name.

package io.pruneport.core

import java.io.ByteArrayOutputStream
import java.io.File
import java.text.Normalizer
import java.util.Locale
import java.util.regex.Pattern
import java.util.regex.PatternSyntaxException

/** The tokenizer of a tokenizer.json with byte pair encoding. */
class Tokenizer private constructor(fields: Fields) {
    private val normaliser =
        fields.optional("normalizer")?.let { Normaliser.of(it, "$FILE.normalizer") } ?: Normaliser.None
    private val cutter = fields.optional("pre_tokenizer")?.let { Cutter.of(it, "$FILE.pre_tokenizer") } ?: Cutter.None
    private val decoder = fields.optional("decoder")?.let { Decoder.of(it, "$FILE.decoder") }
    private val model = BytePairs(fields.fields("model"))
    private val added = AddedTokens(fields.optionalObjects("added_tokens", AddedToken::of), normaliser)

    /** True where single bytes are tokens that the decoder puts together. */
    internal val hasByteTokens: Boolean get() = decoder?.puts == true

    internal val special: List<String> get() = added.all.filter { it.special }.map { it.content }

    fun token(id: Int): String? = added.token(id) ?: model.token(id)

    fun id(token: String): Int? = added.id(token) ?: model.id(token)

    /** Token ids, without what a post-processor adds around them. */
    fun encode(text: String): List<Int> {
        val ids = ArrayList<Int>()
        for (outer in added.split(text, normalised = false)) {
            if (outer.id != null) {
                ids += outer.id
                continue
            }
            for (inner in added.split(normaliser.apply(outer.text), normalised = true)) {
                if (inner.id != null) {
                    ids += inner.id
                    continue
                }
                val pieces = cutter.apply(listOf(inner.text), outer.atStart && inner.atStart)
                for (piece in pieces) ids += model.ids(piece)
            }
        }
        return ids
    }

    /** The text of all ids together, without special tokens and unknown ids. */
    fun decode(ids: List<Int>): String {
        val tokens = ids.mapNotNull(::token).filter { !added.isSpecial(it) }
        return decoder?.apply(tokens)?.joinToString("") ?: tokens.joinToString(" ")
    }

    companion object {
        const val FILE = "tokenizer.json"
        private const val LARGEST = 256 shl 20

        /** Reads the file in the bundle's folder. Throws Trouble. */
        fun read(folder: File): Tokenizer = of(Json.read(File(folder, FILE), LARGEST))

        fun of(json: Json) = Tokenizer(Fields(json, FILE))
    }
}

/** Unicode's White_Space. */
internal fun isSpace(char: Char): Boolean = char in SPACES

private const val SPACES =
    "\t\n\u000B\u000C\r \u0085\u00A0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200A" +
        "\u2028\u2029\u202F\u205F\u3000"

private class AddedToken(
    val id: Int,
    val content: String,
    val special: Boolean,
    val normalised: Boolean,
    val takesSpaceBefore: Boolean,
    val takesSpaceBehind: Boolean,
) {
    companion object {
        fun of(json: Json, place: String): AddedToken {
            val fields = Fields(json, place)
            if (fields.flag("single_word", default = false)) {
                throw Trouble("$place is looked for as a single word, which is not known here", missing = true)
            }
            return AddedToken(
                fields.whole("id", 0..Int.MAX_VALUE),
                fields.text("content").ifEmpty { throw Trouble("$place is empty") },
                fields.flag("special", default = false),
                fields.flag("normalized", default = false),
                fields.flag("lstrip", default = false),
                fields.flag("rstrip", default = false),
            )
        }
    }
}

/** The tokens that text is searched for before anything else. */
private class AddedTokens(val all: List<AddedToken>, normaliser: Normaliser) {
    /** A token's id, or text between tokens. */
    class Part(val id: Int?, val text: String, val atStart: Boolean)

    private class Wanted(val pattern: String, val token: AddedToken)

    private val byContent = all.associateBy { it.content }

    /** As they stand in normalised text where that is searched for them. */
    private val texts = all.associate { it.id to if (it.normalised) normaliser.apply(it.content) else it.content }

    /** Patterns by their first character, the longest first; those of raw and those of normalised text. */
    private val raw = patterns(all.filter { !it.normalised }.map { Wanted(it.content, it) })
    private val normalised = patterns(all.filter { it.normalised }.map { Wanted(normaliser.apply(it.content), it) })

    private fun patterns(wanted: List<Wanted>): Map<Char, List<Wanted>> =
        wanted.filter { it.pattern.isNotEmpty() }.sortedByDescending { it.pattern.length }.groupBy { it.pattern[0] }

    fun token(id: Int): String? = texts[id]

    fun isSpecial(token: String): Boolean = byContent[token]?.special == true

    fun id(token: String): Int? = byContent[token]?.id

    /** Cuts text at these tokens: the leftmost first, the longest of those that begin there. */
    fun split(text: String, normalised: Boolean): List<Part> {
        val patterns = if (normalised) this.normalised else raw
        val parts = ArrayList<Part>()
        var start = 0
        var at = 0
        while (at < text.length) {
            val found = patterns[text[at]]?.firstOrNull { text.startsWith(it.pattern, at) }
            if (found == null) {
                at += 1
                continue
            }
            var before = at
            if (found.token.takesSpaceBefore) while (before > start && isSpace(text[before - 1])) before -= 1
            if (before > start) parts += Part(null, text.substring(start, before), start == 0)
            parts += Part(found.token.id, "", false)
            at += found.pattern.length
            if (found.token.takesSpaceBehind) while (at < text.length && isSpace(text[at])) at += 1
            start = at
        }
        if (start < text.length) parts += Part(null, text.substring(start), start == 0)
        return parts
    }
}

/** What text is searched for: [literal], or a regular expression. */
private class Wording(private val literal: String?, private val regex: Pattern?) {
    /** Where it is found, from left to right; what is found never overlaps. */
    fun matches(text: String): List<IntRange> {
        val found = ArrayList<IntRange>()
        if (literal != null) {
            var at = text.indexOf(literal)
            while (at >= 0 && literal.isNotEmpty()) {
                found += at until at + literal.length
                at = text.indexOf(literal, at + literal.length)
            }
        } else if (regex != null) {
            val matcher = regex.matcher(text)
            while (matcher.find()) if (matcher.end() > matcher.start()) found += matcher.start() until matcher.end()
        }
        return found
    }

    fun replace(text: String, content: String): String {
        val made = StringBuilder()
        var start = 0
        for (range in matches(text)) {
            made.append(text, start, range.first).append(content)
            start = range.last + 1
        }
        return made.append(text, start, text.length).toString()
    }

    companion object {
        fun of(json: Json, place: String): Wording {
            val fields = Fields(json, place)
            if (fields.optional("String") != null) return Wording(fields.text("String"), null)
            return Wording(null, compiled(fields.text("Regex", longest = 10_000), place))
        }

        // Android's engine has no flag that gives these their Unicode meaning, and Java's has none without: both are
        // spelled out.
        private val classes =
            mapOf('s' to SPACES, 'd' to "\\p{Nd}", 'w' to "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}")
        private const val SAME_IN_BOTH = "rntfpPAzZbB"

        fun compiled(written: String, place: String): Pattern {
            val unknown = Trouble("$place has a pattern that cannot be read: ${written.take(200)}", missing = true)
            val spelled = StringBuilder()
            var depth = 0
            var at = 0
            while (at < written.length) {
                val char = written[at++]
                if (char == '[') depth += 1
                if (char == ']') depth -= 1
                if (char != '\\') {
                    spelled.append(char)
                    continue
                }
                val letter = if (at < written.length) written[at++] else throw unknown
                val whole = classes[letter.lowercaseChar()]
                when {
                    whole != null && letter.isLowerCase() -> spelled.append(if (depth > 0) whole else "[$whole]")
                    whole != null -> spelled.append("[^$whole]")
                    letter in SAME_IN_BOTH || !(letter in 'a'..'z' || letter in 'A'..'Z') ->
                        spelled.append('\\').append(letter)
                    else -> throw unknown
                }
            }
            try {
                return Pattern.compile(spelled.toString(), Pattern.UNICODE_CASE)
            } catch (_: PatternSyntaxException) {
                throw unknown
            }
        }
    }
}

private fun unknown(kind: String, place: String) =
    Trouble("$place is of the kind ${kind.take(100)}, which this app does not know", missing = true)

private sealed class Normaliser {
    abstract fun apply(text: String): String

    object None : Normaliser() {
        override fun apply(text: String) = text
    }

    class Prepend(val mark: String) : Normaliser() {
        override fun apply(text: String) = if (text.isEmpty()) text else mark + text
    }

    class Replace(val wording: Wording, val content: String) : Normaliser() {
        override fun apply(text: String) = wording.replace(text, content)
    }

    object Composed : Normaliser() {
        override fun apply(text: String): String = Normalizer.normalize(text, Normalizer.Form.NFC)
    }

    class Steps(val steps: List<Normaliser>) : Normaliser() {
        override fun apply(text: String) = steps.fold(text) { made, step -> step.apply(made) }
    }

    companion object {
        fun of(json: Json, place: String): Normaliser {
            val fields = Fields(json, place)
            return when (val kind = fields.text("type")) {
                "Prepend" -> Prepend(fields.text("prepend"))
                "Replace" -> Replace(Wording.of(fields.value("pattern"), place), fields.text("content"))
                "NFC" -> Composed
                "Sequence" -> Steps(fields.objects("normalizers", ::of))
                else -> throw unknown(kind, place)
            }
        }
    }
}

private enum class Behaviour(val word: String) {
    REMOVED("Removed"),
    ISOLATED("Isolated"),
    WITH_PREVIOUS("MergedWithPrevious"),
    WITH_NEXT("MergedWithNext"),
    CONTIGUOUS("Contiguous"),
}

/** Cuts text into the pieces that the model sees one by one. */
private sealed class Cutter {
    /** [atStart]: the first piece is the beginning of the whole text. */
    abstract fun apply(pieces: List<String>, atStart: Boolean): List<String>

    object None : Cutter() {
        override fun apply(pieces: List<String>, atStart: Boolean) = pieces
    }

    class Split(val wording: Wording, val behaviour: Behaviour, val inverted: Boolean) : Cutter() {
        override fun apply(pieces: List<String>, atStart: Boolean) =
            pieces.flatMap { cut(it, wording, behaviour, inverted) }
    }

    class ByteLevel(val prefix: Boolean, val words: Wording?) : Cutter() {
        override fun apply(pieces: List<String>, atStart: Boolean) =
            pieces.flatMap { piece ->
                val whole = if (prefix && !piece.startsWith(" ")) " $piece" else piece
                val parts = if (words == null) listOf(whole) else cut(whole, words, Behaviour.ISOLATED, false)
                parts.map(ByteLetters::written)
            }
    }

    class Metaspace(val mark: String, val scheme: String, val splits: Boolean) : Cutter() {
        override fun apply(pieces: List<String>, atStart: Boolean) =
            pieces.flatMapIndexed { number, piece ->
                var marked = piece.replace(" ", mark)
                val wanted = scheme == "always" || (scheme == "first" && atStart && number == 0)
                if (wanted && !marked.startsWith(mark)) marked = mark + marked
                if (splits) cut(marked, Wording(mark, null), Behaviour.WITH_NEXT, false) else listOf(marked)
            }
    }

    class Steps(val steps: List<Cutter>) : Cutter() {
        override fun apply(pieces: List<String>, atStart: Boolean) =
            steps.fold(pieces) { made, step -> step.apply(made, atStart) }
    }

    private class Part(val range: IntRange, val isMatch: Boolean)

    companion object {
        private const val WORDS =
            "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

        fun of(json: Json, place: String): Cutter {
            val fields = Fields(json, place)
            return when (val kind = fields.text("type")) {
                "ByteLevel" -> {
                    val cuts = fields.flag("use_regex", default = true)
                    ByteLevel(
                        fields.flag("add_prefix_space", default = true),
                        if (cuts) Wording(null, Wording.compiled(WORDS, place)) else null,
                    )
                }
                "Split" -> {
                    val word = fields.text("behavior")
                    val behaviour = Behaviour.entries.firstOrNull { it.word == word } ?: throw unknown(word, place)
                    val inverted = fields.flag("invert", default = false)
                    Split(Wording.of(fields.value("pattern"), place), behaviour, inverted)
                }
                "Digits" -> {
                    val alone = fields.flag("individual_digits", default = false)
                    val digits = Wording(null, Wording.compiled("\\p{N}", place))
                    Split(digits, if (alone) Behaviour.ISOLATED else Behaviour.CONTIGUOUS, false)
                }
                "Metaspace" -> {
                    val scheme = metaspaceScheme(fields)
                    if (scheme !in listOf("always", "first", "never")) throw unknown(scheme, place)
                    Metaspace(fields.text("replacement"), scheme, fields.flag("split", default = true))
                }
                "Sequence" -> Steps(fields.objects("pretokenizers", ::of))
                else -> throw unknown(kind, place)
            }
        }

        private fun cut(text: String, wording: Wording, behaviour: Behaviour, inverted: Boolean): List<String> {
            val parts = ArrayList<Part>()
            var start = 0
            for (range in wording.matches(text)) {
                if (range.first > start) parts += Part(start until range.first, inverted)
                parts += Part(range, !inverted)
                start = range.last + 1
            }
            if (start < text.length) parts += Part(start until text.length, inverted)
            val made =
                when (behaviour) {
                    Behaviour.ISOLATED -> parts.map { it.range }
                    Behaviour.REMOVED -> parts.filter { !it.isMatch }.map { it.range }
                    Behaviour.CONTIGUOUS -> merged(parts) { before, now -> before == now }
                    Behaviour.WITH_PREVIOUS -> merged(parts) { before, now -> !before && now }
                    Behaviour.WITH_NEXT -> mergedForwards(parts)
                }
            return made.map { text.substring(it) }
        }

        /** Joins a part to the one before where [joins] says so of the two: was that a match, is this one. */
        private fun merged(parts: List<Part>, joins: (Boolean, Boolean) -> Boolean): List<IntRange> {
            val made = ArrayList<IntRange>()
            for ((number, part) in parts.withIndex()) {
                if (number > 0 && joins(parts[number - 1].isMatch, part.isMatch)) {
                    made[made.size - 1] = made.last().first..part.range.last
                } else {
                    made += part.range
                }
            }
            return made
        }

        /** Joins a match to the part behind it. */
        private fun mergedForwards(parts: List<Part>): List<IntRange> {
            val made = ArrayList<IntRange>()
            for ((number, part) in parts.withIndex()) {
                val before = parts.getOrNull(number - 1)
                if (before != null && before.isMatch && !part.isMatch) {
                    made[made.size - 1] = made.last().first..part.range.last
                } else {
                    made += part.range
                }
            }
            return made
        }
    }
}

/** Older files have a flag in its place. */
private fun metaspaceScheme(fields: Fields): String {
    val old = if (fields.flag("add_prefix_space", default = true)) "always" else "never"
    return fields.text("prepend_scheme", default = old)
}

/** The letters that stand for bytes in vocabularies: printable bytes for themselves, the others from U+0100 on. */
private object ByteLetters {
    private val letters = CharArray(256)
    private val bytes = HashMap<Char, Byte>()

    init {
        var next = '\u0100'
        for (byte in 0..255) {
            val isPlain = byte in 0x21..0x7E || byte in 0xA1..0xAC || byte in 0xAE..0xFF
            letters[byte] = if (isPlain) byte.toChar() else next++
            bytes[letters[byte]] = byte.toByte()
        }
    }

    fun written(text: String): String {
        val made = StringBuilder()
        for (byte in text.toByteArray(Charsets.UTF_8)) made.append(letters[byte.toInt() and 0xFF])
        return made.toString()
    }

    /** The bytes that a token's letters stand for; its own where one of them is no such letter. */
    fun read(token: String): ByteArray {
        val made = ByteArray(token.length)
        for ((at, char) in token.withIndex()) made[at] = bytes[char] ?: return token.toByteArray(Charsets.UTF_8)
        return made
    }
}

private sealed class Decoder {
    abstract fun apply(tokens: List<String>): List<String>

    /** True where it puts tokens of single bytes together. */
    open val puts: Boolean get() = false

    object ByteLevel : Decoder() {
        override fun apply(tokens: List<String>): List<String> {
            val all = ByteArrayOutputStream()
            for (token in tokens) ByteLetters.read(token).let { all.write(it, 0, it.size) }
            return listOf(textOf(all.toByteArray()))
        }
    }

    class Replace(val wording: Wording, val content: String) : Decoder() {
        override fun apply(tokens: List<String>) = tokens.map { wording.replace(it, content) }
    }

    object ByteFallback : Decoder() {
        override val puts get() = true

        override fun apply(tokens: List<String>): List<String> {
            val made = ArrayList<String>()
            val run = ByteArrayOutputStream()

            fun end() {
                val bytes = run.toByteArray()
                if (bytes.isNotEmpty()) made += if (isText(bytes)) textOf(bytes) else "\uFFFD".repeat(bytes.size)
                run.reset()
            }
            for (token in tokens) {
                val byte = byteOfToken(token)
                if (byte != null) {
                    run.write(byte)
                } else {
                    end()
                    made += token
                }
            }
            end()
            return made
        }
    }

    object Fuse : Decoder() {
        override fun apply(tokens: List<String>) = listOf(tokens.joinToString(""))
    }

    class Strip(val content: String, val start: Int, val stop: Int) : Decoder() {
        override fun apply(tokens: List<String>) =
            tokens.map { token ->
                var rest = token
                var left = start
                while (left-- > 0 && rest.startsWith(content)) rest = rest.removePrefix(content)
                left = stop
                while (left-- > 0 && rest.endsWith(content)) rest = rest.removeSuffix(content)
                rest
            }
    }

    class Metaspace(val mark: String, val prefix: Boolean) : Decoder() {
        override fun apply(tokens: List<String>) =
            tokens.mapIndexed { number, token ->
                // In the first token all marks go, as the library has it.
                token.replace(mark, if (number == 0 && prefix) "" else " ")
            }
    }

    class Steps(val steps: List<Decoder>) : Decoder() {
        override val puts get() = steps.any { it.puts }

        override fun apply(tokens: List<String>) = steps.fold(tokens) { made, step -> step.apply(made) }
    }

    companion object {
        fun of(json: Json, place: String): Decoder {
            val fields = Fields(json, place)
            return when (val kind = fields.text("type")) {
                "ByteLevel" -> ByteLevel
                "Replace" -> Replace(Wording.of(fields.value("pattern"), place), fields.text("content"))
                "ByteFallback" -> ByteFallback
                "Fuse" -> Fuse
                "Strip" ->
                    Strip(
                        fields.text("content").ifEmpty { throw Trouble("$place strips nothing") },
                        fields.whole("start", 0..1_000_000),
                        fields.whole("stop", 0..1_000_000),
                    )
                "Metaspace" -> Metaspace(fields.text("replacement"), metaspaceScheme(fields) != "never")
                "Sequence" -> Steps(fields.objects("decoders", ::of))
                else -> throw unknown(kind, place)
            }
        }
    }
}

/** The byte that a token such as `<0x0A>` stands for. */
internal fun byteOfToken(token: String): Int? {
    if (token.length != 6 || !token.startsWith("<0x") || token[5] != '>') return null
    val (high, low) = Character.digit(token[3], 16) to Character.digit(token[4], 16)
    return if (high < 0 || low < 0) null else high * 16 + low
}

private fun isText(bytes: ByteArray) = spoiltBytes(bytes) == 0

/**
 * The text of bytes in UTF-8, with a replacement for each longest part that begins a character and does not end it.
 *
 * Systems differ in how many they put for broken bytes, so that theirs are not asked.
 */
internal fun textOf(bytes: ByteArray): String {
    if (isText(bytes)) return String(bytes, Charsets.UTF_8)
    val made = StringBuilder()
    var at = 0
    while (at < bytes.size) {
        val length = characterLength(bytes, at)
        if (length > 0) {
            made.append(String(bytes, at, length, Charsets.UTF_8))
            at += length
        } else {
            made.append('\uFFFD')
            at += maxOf(1, -length)
        }
    }
    return made.toString()
}

/** How many bytes cannot belong to any character; 0 where all are whole ones, -1 where they may become so. */
internal fun spoiltBytes(bytes: ByteArray): Int {
    var at = 0
    while (at < bytes.size) {
        val length = characterLength(bytes, at)
        if (length <= 0) return if (at - length == bytes.size) -1 else at + maxOf(1, -length)
        at += length
    }
    return 0
}

/** Bytes of the character that begins there; as a negative number those that fit one that does not end, 0 for none. */
private fun characterLength(bytes: ByteArray, at: Int): Int {
    val first = bytes[at].toInt() and 0xFF
    val length =
        when (first) {
            in 0x00..0x7F -> 1
            in 0xC2..0xDF -> 2
            in 0xE0..0xEF -> 3
            in 0xF0..0xF4 -> 4
            else -> return 0
        }
    for (offset in 1 until length) {
        val allowed =
            when {
                offset > 1 -> 0x80..0xBF
                first == 0xE0 -> 0xA0..0xBF
                first == 0xED -> 0x80..0x9F
                first == 0xF0 -> 0x90..0xBF
                first == 0xF4 -> 0x80..0x8F
                else -> 0x80..0xBF
            }
        if (at + offset >= bytes.size || (bytes[at + offset].toInt() and 0xFF) !in allowed) return -offset
    }
    return length
}

/** Byte pair encoding. */
private class BytePairs(fields: Fields) {
    private val vocabulary = HashMap<String, Int>()
    private val tokens = HashMap<Int, String>()

    /** Ranks and what is made, by the ids of a pair; each two numbers in one. */
    private val merges = HashMap<Long, Long>()
    private val unknown: Int?
    private val fusesUnknown = fields.flag("fuse_unk", default = false)
    private val ignoresMerges = fields.flag("ignore_merges", default = false)

    /** Tokens of single bytes by their byte; empty where none are to be used. */
    private val byteTokens = HashMap<Byte, Int>()

    init {
        val kind = fields.text("type", default = "BPE")
        if (kind != "BPE") throw unknown(kind, fields.place)
        for (name in listOf("continuing_subword_prefix", "end_of_word_suffix")) {
            if (fields.text(name, default = "") != "") {
                throw Trouble("${fields.place}.$name is set, which this app does not know", missing = true)
            }
        }
        for ((token, value) in fields.members("vocab")) {
            val id = (value as? Json.Whole)?.value ?: -1
            if (id !in 0..Int.MAX_VALUE) throw Trouble("${fields.place}.vocab has no id for ${token.take(100)}")
            vocabulary[token] = id.toInt()
            tokens[id.toInt()] = token
        }
        for ((rank, entry) in fields.list("merges", longest = 10_000_000).withIndex()) {
            val (left, right) = halves(entry, fields.place)
            val ids = listOf(left, right, left + right).map { vocabulary[it] ?: lacking(rank, fields.place) }
            merges[pair(ids[0], ids[1])] = pair(rank, ids[2])
        }
        val named = fields.text("unk_token", default = "")
        unknown = vocabulary[named]
        if (named != "" && unknown == null) throw Trouble("${fields.place}.unk_token is not in the vocabulary")
        if (fields.flag("byte_fallback", default = false)) {
            for (byte in 0..255) {
                vocabulary["<0x%02X>".format(Locale.ROOT, byte)]?.let { byteTokens[byte.toByte()] = it }
            }
        }
    }

    private fun lacking(rank: Int, place: String): Nothing =
        throw Trouble("$place.merges[$rank] is of tokens that the vocabulary lacks")

    private fun pair(high: Int, low: Int): Long = high.toLong() shl 32 or low.toLong()

    /** Of `["a", "b"]`, or of `a b` as older files have it. */
    private fun halves(json: Json, place: String): List<String> {
        val parts =
            when (json) {
                is Json.Items -> json.values.map { (it as? Json.Text)?.value ?: "" }
                is Json.Text -> json.value.split(" ")
                else -> emptyList()
            }
        if (parts.size != 2) throw Trouble("$place.merges has an entry that is no pair")
        return parts
    }

    fun token(id: Int): String? = tokens[id]

    fun id(token: String): Int? = vocabulary[token]

    fun ids(piece: String): List<Int> {
        if (ignoresMerges) vocabulary[piece]?.let { return listOf(it) }
        val ids = ArrayList<Int>()
        var pending: Int? = null
        var at = 0
        while (at < piece.length) {
            val next = piece.offsetByCodePoints(at, 1)
            val letter = piece.substring(at, next)
            at = next
            val id = vocabulary[letter]
            val bytes = if (id == null) bytes(letter) else null
            if (id != null) {
                pending?.let { ids += it }
                pending = null
                ids += id
            } else if (bytes != null) {
                // Before an unknown token that is still pending, as the library has it.
                ids += bytes
            } else if (unknown != null) {
                if (!fusesUnknown) pending?.let { ids += it }
                pending = unknown
            }
        }
        pending?.let { ids += it }
        return merged(ids)
    }

    /** The tokens of a letter's bytes; null where one of them has none. */
    private fun bytes(letter: String): List<Int>? =
        letter.toByteArray(Charsets.UTF_8).map { byteTokens[it] ?: return null }

    /** Joins the pair that was learned first, the leftmost of several, until none is left. */
    private fun merged(ids: ArrayList<Int>): List<Int> {
        fun ranked(at: Int): Long = merges[pair(ids[at], ids[at + 1])] ?: Long.MAX_VALUE
        val ranks = (0 until ids.size - 1).mapTo(ArrayList()) { ranked(it) }
        while (true) {
            var at = -1
            for (place in ranks.indices) if (at < 0 || ranks[place] < ranks[at]) at = place
            if (at < 0 || ranks[at] == Long.MAX_VALUE) return ids
            ids[at] = ranks[at].toInt()
            ids.removeAt(at + 1)
            ranks.removeAt(at)
            if (at < ranks.size) ranks[at] = ranked(at)
            if (at > 0) ranks[at - 1] = ranked(at - 1)
        }
    }
}
