// A job without a screen: the folder it is read from, the one its findings go to, and what is written if it fails.

package io.pruneport.app

import android.content.Context
import android.util.Log
import io.pruneport.core.DType
import io.pruneport.core.Findings
import io.pruneport.core.GraphInfo
import io.pruneport.core.GraphName
import io.pruneport.core.JobFile
import io.pruneport.core.JobRun
import io.pruneport.core.Json
import io.pruneport.core.Manifest
import io.pruneport.core.Place
import io.pruneport.core.Prompt
import io.pruneport.core.RunnerInfo
import io.pruneport.core.Safetensors
import io.pruneport.core.Tensor
import io.pruneport.core.Tokenizer
import io.pruneport.core.Trouble
import io.pruneport.core.TroubleFound
import java.io.File
import java.io.IOException
import java.security.SecureRandom
import java.time.Instant
import java.time.temporal.ChronoUnit

private const val APP = "pruneport Android app"

/** What to run: the job in a folder, or the bundle in a folder, as minibench is asked to. */
internal sealed class Wanted {
    /** The findings go to a folder of this name among the app's jobs. */
    abstract val name: String

    /** The [bundle] and the [twin] lie in the folder of the job where no others are named. */
    data class Job(val folder: File, val bundle: File?, val twin: File?) : Wanted() {
        val place: Place get() = Place(folder).let { Place(folder, bundle ?: it.bundle, twin ?: it.twin) }
        override val name: String get() = folder.name
    }

    /** Without a [prompt] nothing is answered; null for a number leaves it to the contract of jobs. */
    data class Bare(val bundle: File, val runs: Int?, val warmup: Int?, val prompt: String?) : Wanted() {
        override val name get() = "minibench"
    }
}

/** Runs what is wanted and writes findings, whatever happens; [say] hears one line a stage. */
internal class HeadlessJob(
    private val context: Context,
    private val wanted: Wanted,
    private val say: (String) -> Unit,
) {
    private val started = now()
    private val out = File(context.filesDir, "jobs/${wanted.name}")

    fun run() {
        try {
            // Old findings would be taken for this job's.
            out.deleteRecursively()
            val place =
                when (wanted) {
                    is Wanted.Job -> wanted.place
                    is Wanted.Bare -> made(wanted)
                }
            JobRun(place, PhoneState(context), allEngines(context), APP, appVersion(context), say).run(out)
        } catch (error: Exception) {
            fail(error)
        } catch (error: OutOfMemoryError) {
            fail(error)
        } catch (error: LinkageError) {
            fail(error)
        }
        if (wanted is Wanted.Bare) leaveForMinibench()
    }

    /** Findings that say why there are no others. */
    private fun fail(error: Throwable) {
        Log.e(TAG, "the job failed", error)
        val id = if (Regex("[0-9a-f]{16}").matches(wanted.name)) wanted.name else "0".repeat(16)
        try {
            Findings(
                job = id,
                bundle = "unknown",
                twin = null,
                device = PhoneState(context).info,
                runner = RunnerInfo(APP, appVersion(context), "none", "none", ""),
                threads = 1,
                startedUtc = started,
                endedUtc = now(),
                trouble = TroubleFound.of(error),
            ).write(emptyMap(), Json.Items(emptyList()), out)
        } catch (again: Exception) {
            Log.e(TAG, "not even that could be written", again)
        }
    }

    /** Where minibench leaves its results, and its readers look for them. */
    private fun leaveForMinibench() {
        try {
            File(out, Findings.MINIBENCH).copyTo(File(context.filesDir, Findings.MINIBENCH), overwrite = true)
        } catch (error: IOException) {
            Log.e(TAG, "the results could not be copied", error)
        }
    }

    /** A job over a bundle alone: the vision graph on a blank picture and, where there is a prompt, an answer. */
    private fun made(wanted: Wanted.Bare): Place {
        val manifest = Manifest.read(wanted.bundle)
        val vision = manifest.graph(GraphName.VISION) ?: throw Trouble("${manifest.name} has no ${GraphName.VISION}")
        val folder = File(context.cacheDir, wanted.name)
        folder.deleteRecursively()
        if (!folder.mkdirs()) throw Trouble("the job cannot be written; is the device full?")
        val key = "${GraphName.VISION}/${GraphName.VISION}"
        val tensors = vision.inputs.associate { "in/$key/${it.name}" to Tensor(it.dtype, it.shape) }.toMutableMap()
        tensors["pixel_values"] = Tensor(DType.FLOAT32, listOf(1, 3, manifest.image.height, manifest.image.width))
        Safetensors.write(tensors, File(folder, JobFile.INPUTS))
        File(folder, JobFile.FILE).writeText(job(wanted, manifest, vision).written())
        return Place(folder, wanted.bundle)
    }

    private fun job(wanted: Wanted.Bare, manifest: Manifest, vision: GraphInfo): Json {
        val members = LinkedHashMap<String, Json>()
        val id = ByteArray(8).also { SecureRandom().nextBytes(it) }
        members["id"] = Json.Text(id.joinToString("") { "%02x".format(it) })
        members["bundle"] = Json.Text(manifest.name)
        members["vision"] = Json.Text(vision.stored)
        members["steps"] =
            Json.Items(
                listOf(
                    Json.of(
                        "graph" to Json.Text(vision.name),
                        "stored" to Json.Text(vision.stored),
                        "step" to Json.Text(vision.name),
                    ),
                ),
            )
        val timing = LinkedHashMap<String, Json>()
        wanted.warmup?.let { timing["warmup"] = Json.Whole(it.toLong()) }
        wanted.runs?.let { for (name in listOf("runs", "answers")) timing[name] = Json.Whole(it.toLong()) }
        members["timing"] = Json.Members(timing)
        if (wanted.prompt != null) {
            val text = manifest.text ?: throw Trouble("${manifest.name} has no text graphs to answer with")
            val ids = Prompt(Tokenizer.read(wanted.bundle), manifest.prompt).ids(wanted.prompt)
            val most = (text.tokens - ids.size + 1).coerceIn(1, NEW_TOKENS)
            members["answer"] =
                Json.of(
                    "question" to Json.Items(ids.map { Json.Whole(it.toLong()) }),
                    "new_tokens" to Json.Whole(most.toLong()),
                )
        }
        return Json.Members(members)
    }

    private companion object {
        const val NEW_TOKENS = 16

        fun now(): String = Instant.now().truncatedTo(ChronoUnit.SECONDS).toString()
    }
}
