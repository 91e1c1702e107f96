// How the next token is chosen.

package io.pruneport.core

/**
 * Greedily at temperature 0, else from the likeliest tokens that together reach [topP], by a seeded draw.
 *
 * Throws Trouble for what lies outside of 0 to 100 and of 0 (excluded) to 1.
 */
class Sampling(val temperature: Double = 0.0, val topP: Double = 1.0, seed: Long = 0) {
    private var state = seed

    init {
        if (temperature !in 0.0..100.0 || !(topP > 0 && topP <= 1)) {
            throw Trouble("temperature lies in 0 to 100, and top_p above 0 and at most at 1")
        }
    }

    /** One token for logits (V,), the first on ties where the likeliest counts. Throws Trouble where none can be. */
    fun choose(logits: FloatArray): Int {
        if (logits.isEmpty()) throw Trouble("the graph gave no logits")
        if (logits.any { it.isNaN() }) throw Trouble("the graph gave not a number instead of logits")
        var best = 0
        for (token in logits.indices) if (logits[token] > logits[best]) best = token
        val largest = logits[best]
        if (largest == Float.NEGATIVE_INFINITY) {
            throw Trouble("the graph gave minus infinity for all instead of logits")
        }
        if (temperature == 0.0) return best
        // Below the largest, which may be infinite, before they are divided by what may be next to nothing.
        val weights =
            DoubleArray(logits.size) {
                if (logits[it] == largest) 1.0 else Math.exp((logits[it].toDouble() - largest) / temperature)
            }
        val order = logits.indices.sortedByDescending { weights[it] }
        val all = weights.sum()
        var reached = 0.0
        var kept = 0
        for (token in order) {
            reached += weights[token] / all
            kept += 1
            // The likeliest up to and including the one that reaches top_p.
            if (topP < 1 && reached >= topP * (1 - 1e-12)) break
        }
        var left = next() * reached
        for (token in order.take(kept)) {
            left -= weights[token] / all
            if (left < 0) return token
        }
        // Rounding left nothing to draw from: the last that may come at all.
        return order.take(kept).last { weights[it] > 0 }
    }

    /** A number in 0 until 1 by SplitMix64: the same for one seed on every system. */
    private fun next(): Double {
        state += -0x61c8864680b583ebL
        var mixed = state
        mixed = (mixed xor (mixed ushr 30)) * -0x40a7b892e31b1a47L
        mixed = (mixed xor (mixed ushr 27)) * -0x6b2fb644ecceee15L
        return ((mixed xor (mixed ushr 31)) ushr 11) * (1.0 / (1L shl 53))
    }
}
