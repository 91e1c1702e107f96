// Named checks without a framework: each is run, what fails is printed, the last line counts.

package io.pruneport.core

import java.io.File

class Checks {
    private var passed = 0
    private var failed = 0

    fun check(name: String, block: () -> Unit) {
        try {
            block()
            passed += 1
        } catch (error: Exception) {
            fail(name, error)
        } catch (error: AssertionError) {
            fail(name, error)
        } catch (error: StackOverflowError) {
            fail(name, error)
        }
    }

    private fun fail(name: String, error: Throwable) {
        failed += 1
        println("FAILED $name: $error")
        error.stackTrace.take(6).forEach { println("    $it") }
    }

    /** Prints the last line; true where nothing failed. */
    fun end(): Boolean {
        println("$passed passed, $failed failed")
        return failed == 0
    }
}

fun assertEqual(got: Any?, expected: Any?) {
    if (got != expected) throw AssertionError("$got, not $expected")
}

fun assertTrue(holds: Boolean, what: String) {
    if (!holds) throw AssertionError(what)
}

/** The block throws Trouble whose message holds these words. */
fun assertTrouble(words: String, block: () -> Unit) {
    try {
        block()
    } catch (error: Trouble) {
        assertTrue(words in error.message, "'${error.message}' lacks '$words'")
        return
    }
    throw AssertionError("there was no Trouble; '$words' was expected")
}

/** Runs a block with an empty folder that is gone behind it. */
fun withFolder(block: (File) -> Unit) {
    val folder = java.nio.file.Files.createTempDirectory("core").toFile()
    try {
        block(folder)
    } finally {
        folder.deleteRecursively()
    }
}
