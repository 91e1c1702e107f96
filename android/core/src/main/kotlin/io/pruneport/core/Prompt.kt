// The question inside the conversation that the bundle's manifest holds, and the answer as it streams.

package io.pruneport.core

/**
 * The tokenizer of a bundle together with the text around a question.
 *
 * Throws Trouble where only the chat template says what stands behind the image: phones have no Jinja.
 */
class Prompt(private val tokenizer: Tokenizer, info: PromptInfo) {
    private val suffix: String = info.suffixText.orEmpty()
    private val trims = info.trimsQuestion
    private val imageId: Int
    private val imageText: String
    private val special = tokenizer.special.sortedBy { it.length }

    init {
        if (QUESTION !in suffix) {
            throw Trouble(
                "only the chat template of this bundle says what stands behind a question, and this app has no " +
                    "Jinja: make the token ids on the desktop and send them as a job",
                missing = true,
            )
        }
        imageId = info.image ?: throw foreign()
        imageText = tokenizer.token(imageId) ?: throw foreign()
    }

    private fun foreign() = Trouble("${Tokenizer.FILE} lacks the image token: it belongs to another model")

    /** The ids behind the image. Throws Trouble for an empty question, or one that holds a special token. */
    fun ids(question: String): List<Int> {
        val trimmed = question.trim(::isOuterSpace)
        if (trimmed.isEmpty()) throw Trouble("the question is empty; ask something")
        if (imageText in question) {
            throw Trouble("the question holds $imageText, a second image; one image is supported")
        }
        special.firstOrNull { it in question }?.let {
            throw Trouble("the question holds the special token $it, which only the conversation may have")
        }
        // Behind the image token, as in the whole conversation: some tokenizers treat the start of a text specially.
        val ids = tokenizer.encode(imageText + suffix.replace(QUESTION, if (trims) trimmed else question))
        val at = ids.indexOf(imageId)
        if (at < 0) throw Trouble("${Tokenizer.FILE} does not find its image token")
        return ids.drop(at + 1)
    }

    /** A stream of text, to be given the ids of an answer. */
    fun stream() = AnswerText(tokenizer)

    companion object {
        private const val QUESTION = "{question}"

        /** White space as Python strips it. */
        private fun isOuterSpace(char: Char) = isSpace(char) || char in '\u001C'..'\u001F'
    }
}

/** An answer as it becomes text, piece by piece; a character of several tokens comes out when it is whole. */
class AnswerText internal constructor(private val tokenizer: Tokenizer) {
    private class Begun(val id: Int, val byte: Int)

    private val special = tokenizer.special.toSet()
    private val broken = listOf("<0xEF>", "<0xBF>", "<0xBD>").mapNotNull(tokenizer::id).takeIf { it.size == 3 }
    private val sound = ArrayList<Int>()

    /** Bytes of a character that is not whole. */
    private val begun = ArrayList<Begun>()
    private var said = ""

    /** What can be shown now that this id has come. */
    fun append(id: Int): String {
        tokenizer.token(id)?.let { token ->
            val byte = if (tokenizer.hasByteTokens) byteOfToken(token) else null
            if (byte != null) {
                begun += Begun(id, byte)
                settle(atEnd = false)
            } else if (token !in special) {
                settle(atEnd = true)
                sound += id
            }
        }
        // What ends in a replacement may be a character on its way.
        return unsaid(tokenizer.decode(sound).removeSuffix("\uFFFD"))
    }

    /** What is left once no id comes any more. */
    fun finish(): String {
        settle(atEnd = true)
        return unsaid(tokenizer.decode(sound))
    }

    private fun unsaid(text: String): String {
        var same = text.commonPrefixWith(said).length
        if (same == text.length) return ""
        if (same > 0 && text[same].isLowSurrogate()) same -= 1
        said = text
        return text.substring(same)
    }

    /** Moves what is decided from [begun] to [sound]: a whole character, or bytes that belong to none. */
    private fun settle(atEnd: Boolean) {
        while (begun.isNotEmpty()) {
            val spoilt = spoiltBytes(ByteArray(begun.size) { begun[it].byte.toByte() })
            when {
                spoilt == 0 -> {
                    sound += begun.map { it.id }
                    begun.clear()
                }
                spoilt < 0 && !atEnd -> return
                else -> spoil(if (spoilt < 0) begun.size else spoilt)
            }
        }
    }

    private fun spoil(count: Int) {
        val lost = begun.subList(0, count)
        for (one in lost) sound += broken ?: listOf(one.id)
        lost.clear()
    }
}
