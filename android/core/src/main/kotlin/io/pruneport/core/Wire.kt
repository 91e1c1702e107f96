// What crosses the cable: job.json to the phone, findings.json back. Times are milliseconds, sizes bytes.
//
// runtime/devices/wire.py is the contract; docs/job.schema.json and docs/findings.schema.json are made from it.

package io.pruneport.core

import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.nio.file.Files
import java.nio.file.StandardCopyOption

/** One run of a graph on the golden's inputs; [stored] is what its file calls it. */
data class StepJob(val graph: String, val stored: String, val step: String)

/** The question behind the photo, token ids, and how many tokens to answer with, past any end. */
data class AnswerJob(val question: List<Int>, val newTokens: Int)

/** Runs of each graph before and while it is timed, and of whole answers behind one that warms up. */
data class TimingJob(val warmup: Int, val runs: Int, val answers: Int)

/** The unpruned twin, whose answers are timed in turns with the bundle's. */
data class TwinJob(val bundle: String, val folder: String, val vision: String)

/** How cool a device must be before it is timed, and how long it may take to become so. */
data class GateJob(val mostCelsius: Double, val waitS: Double)

/** job.json: what to run. */
data class JobFile(
    val id: String,
    val bundle: String,
    val folder: String,
    val vision: String,
    val steps: List<StepJob>,
    val answer: AnswerJob?,
    val threads: Int,
    val timing: TimingJob?,
    val twin: TwinJob?,
    val gate: GateJob?,
) {
    companion object {
        const val VERSION = 1
        const val FILE = "job.json"
        const val INPUTS = "inputs.safetensors"
        private const val LARGEST = 64 shl 20
        private val NAMES =
            setOf(
                "id", "bundle", "folder", "vision", "steps", "answer", "threads", "timing", "twin", "gate",
                "job_version",
            )
        private val ID = Regex("[0-9a-f]{16}")

        /** Reads the job in a folder. Throws Trouble. */
        fun read(folder: File): JobFile = of(Json.read(File(folder, FILE), LARGEST))

        fun of(json: Json): JobFile {
            val version = Fields(json, FILE).whole("job_version", 0..Int.MAX_VALUE, default = VERSION)
            if (version != VERSION) {
                throw Trouble(
                    "$FILE is of version $version, this app runs $VERSION; use app and pruneport of one release",
                )
            }
            val fields = Fields(json, FILE, NAMES)
            val id = fields.text("id")
            if (!ID.matches(id)) throw Trouble("$FILE.id is not 16 lower-case hexadecimal digits")
            val steps = fields.objects("steps", ::step)
            if (steps.size > 10_000) throw Trouble("$FILE.steps has more than 10000 entries")
            return JobFile(
                id = id,
                bundle = fields.name("bundle"),
                folder = folder(fields, "bundle"),
                vision = fields.name("vision"),
                steps = steps,
                answer = fields.optionalFields("answer", setOf("question", "new_tokens"))?.let(::answer),
                threads = fields.whole("threads", 0..256, default = 0),
                timing = fields.optionalFields("timing", setOf("warmup", "runs", "answers"))?.let(::timing),
                twin =
                    fields.optionalFields("twin", setOf("bundle", "folder", "vision"))?.let {
                        TwinJob(it.name("bundle"), folder(it, "twin"), it.name("vision"))
                    },
                gate =
                    fields.optionalFields("gate", setOf("most_celsius", "wait_s"))?.let {
                        GateJob(
                            it.number("most_celsius", Double.MIN_VALUE..100.0, default = 37.0),
                            it.number("wait_s", 0.0..3600.0, default = 600.0),
                        )
                    },
            )
        }

        private fun folder(fields: Fields, only: String): String {
            if (fields.text("folder", default = only) != only) throw Trouble("${fields.place}.folder is not $only")
            return only
        }

        private fun step(json: Json, place: String): StepJob {
            val fields = Fields(json, place, setOf("graph", "stored", "step"))
            return StepJob(fields.name("graph"), fields.name("stored"), fields.name("step"))
        }

        private fun answer(fields: Fields): AnswerJob {
            val question = fields.wholes("question", 0..Int.MAX_VALUE)
            if (question.isEmpty()) throw Trouble("${fields.place}.question is empty")
            return AnswerJob(question, fields.whole("new_tokens", 1..Int.MAX_VALUE))
        }

        private fun timing(fields: Fields) =
            TimingJob(
                fields.whole("warmup", 0..1_000_000, default = 2),
                fields.whole("runs", 1..1_000_000, default = 10),
                fields.whole("answers", 1..40_000, default = 5),
            )
    }
}

/** The kinds of what runs a job, by their word in the findings. */
enum class DeviceKind(val word: String) {
    PHONE("phone"),
    EMULATED("emulated"),
    SIMULATOR("simulator"),
    DESKTOP("desktop"),
}

/** What ran a job; numbers are 0 where it does not tell. */
data class DeviceInfo(
    val name: String,
    val kind: DeviceKind,
    val os: String,
    val abi: String,
    val soc: String,
    val cores: Int,
    val ramBytes: Long,
)

/** The program that ran the job and the engine in it. */
data class RunnerInfo(
    val name: String,
    val version: String,
    val engine: String,
    val engineVersion: String,
    val engineCommit: String,
)

/** The state of the device so long after the job began; null for what its system does not tell. */
data class Condition(
    val thermal: String? = null,
    val celsius: Double? = null,
    val battery: Double? = null,
    val charging: Boolean? = null,
    val lowPower: Boolean? = null,
    val atMs: Double = 0.0,
)

/** How long a device was waited for; [passed] is null where it has no thermometer. */
data class GateFound(val waitedS: Double, val passed: Boolean?)

/** Why something was not run. */
data class TroubleFound(val message: String, val missing: Boolean) {
    companion object {
        fun of(error: Throwable): TroubleFound {
            val said = if (error is Trouble) error.message else error.toString()
            return TroubleFound(shortened(said, 4000), error is Trouble && error.missing)
        }
    }
}

/** What came of a step. */
data class StepFound(
    val graph: String,
    val step: String,
    var loadMs: List<Double> = emptyList(),
    var warmupMs: List<Double> = emptyList(),
    var runMs: List<Double> = emptyList(),
    var trouble: TroubleFound? = null,
)

/** One photo and one question, from end to end. */
data class AnswerRun(val times: AnswerTimes, val preprocessMs: Double, val twin: Boolean, val warmup: Boolean) {
    val ttftPhotoMs: Double get() = preprocessMs + times.imageReady + times.ttftQuestion
}

/** What was answered: greedy ids, and the sizes that belong to the times in [runs]. */
data class AnswerFound(
    val imageTokensBefore: Int,
    val imageTokensAfter: Int,
    val questionTokens: Int,
    var ids: List<Int> = emptyList(),
    var cacheBytes: Long? = null,
    var runs: List<AnswerRun> = emptyList(),
    var trouble: TroubleFound? = null,
)

/** Resident memory: the highest while it ran, and what is left once all graphs are closed. */
data class MemoryFound(val peakRssBytes: Long, val afterCloseBytes: Long?)

/** Opening all graphs: the first time on this device, and each later time. */
data class LoadFound(val firstMs: List<Double> = emptyList(), val laterMs: List<Double> = emptyList())

/** findings.json: what came of a job. */
data class Findings(
    val job: String,
    val bundle: String,
    val twin: String?,
    val device: DeviceInfo,
    val runner: RunnerInfo,
    val threads: Int,
    val startedUtc: String,
    var endedUtc: String,
    var load: LoadFound = LoadFound(),
    var gate: GateFound? = null,
    var conditions: List<Condition> = emptyList(),
    var photoRefused: String = "",
    var steps: List<StepFound> = emptyList(),
    var answer: AnswerFound? = null,
    var memory: MemoryFound? = null,
    var accumulatorBits: Int? = null,
    var trouble: TroubleFound? = null,
) {
    fun toJson(): Json =
        record(
            "job" to text(job),
            "bundle" to text(bundle),
            "twin" to twin?.let(::text),
            "device" to
                record(
                    "name" to named(device.name),
                    "kind" to text(device.kind.word),
                    "os" to named(device.os),
                    "abi" to named(device.abi),
                    "soc" to text(shortened(device.soc, 4000)),
                    "cores" to whole(device.cores),
                    "ram_bytes" to whole(device.ramBytes),
                ),
            "runner" to
                record(
                    "name" to named(runner.name),
                    "version" to named(runner.version),
                    "engine" to named(runner.engine),
                    "engine_version" to named(runner.engineVersion),
                    "engine_commit" to text(shortened(runner.engineCommit, 4000)),
                ),
            "threads" to whole(threads),
            "started_utc" to text(startedUtc),
            "ended_utc" to text(endedUtc),
            "load" to record("first_ms" to Json.numbers(load.firstMs), "later_ms" to Json.numbers(load.laterMs)),
            "gate" to
                gate?.let {
                    Json.of("waited_s" to Json.Real(it.waitedS), "passed" to (it.passed?.let(Json::Flag) ?: Json.Null))
                },
            "conditions" to Json.Items(conditions.map(::condition)),
            "photo_refused" to text(photoRefused),
            "steps" to Json.Items(steps.map(::step)),
            "answer" to answer?.let(::answer),
            "memory" to
                memory?.let {
                    record(
                        "peak_rss_bytes" to whole(it.peakRssBytes),
                        "after_close_bytes" to it.afterCloseBytes?.let(::whole),
                    )
                },
            "accumulator_bits" to accumulatorBits?.let(::whole),
            "trouble" to trouble?.let(::why),
            "findings_version" to whole(VERSION),
        )

    /** Writes the tensors and what minibench's readers look for, then findings.json: where that is, all is. */
    fun write(outputs: Map<String, Tensor>, minibench: Json, folder: File) {
        try {
            val file = File(folder, FILE)
            Files.createDirectories(folder.toPath())
            // Old findings would speak of new tensors.
            Files.deleteIfExists(file.toPath())
            Safetensors.write(outputs, File(folder, OUTPUTS))
            replace(File(folder, MINIBENCH), minibench.written())
            replace(file, toJson().written())
        } catch (error: IOException) {
            throw Trouble("the findings cannot be written: ${error.message}; is the device full?")
        }
    }

    companion object {
        const val VERSION = 1
        const val FILE = "findings.json"
        const val OUTPUTS = "outputs.safetensors"
        const val MINIBENCH = "benchmark_results.json"

        /** Written beside, then moved to its place as a whole. */
        private fun replace(file: File, content: String) {
            val beside = File(file.parentFile, ".${file.name}")
            FileOutputStream(beside).use {
                it.write(content.toByteArray(Charsets.UTF_8))
                it.fd.sync()
            }
            Files.move(beside.toPath(), file.toPath(), StandardCopyOption.ATOMIC_MOVE)
        }

        /** Without what is not told. */
        private fun record(vararg members: Pair<String, Json?>): Json {
            val told = LinkedHashMap<String, Json>()
            for ((name, value) in members) if (value != null) told[name] = value
            return Json.Members(told)
        }

        private fun text(value: String): Json = Json.Text(value)

        /** The contract's names have 1 to 256 characters. */
        private fun named(value: String): Json = Json.Text(shortened(value, 256).ifEmpty { "unknown" })

        private fun whole(value: Int): Json = Json.Whole(value.toLong())

        private fun whole(value: Long): Json = Json.Whole(value)

        private fun why(found: TroubleFound): Json =
            record("message" to text(found.message), "missing" to Json.Flag(found.missing))

        private fun condition(seen: Condition): Json =
            record(
                "at_ms" to Json.Real(seen.atMs),
                "thermal" to seen.thermal?.let(::text),
                "celsius" to seen.celsius?.let(Json::Real),
                "battery" to seen.battery?.let(Json::Real),
                "charging" to seen.charging?.let(Json::Flag),
                "low_power" to seen.lowPower?.let(Json::Flag),
            )

        private fun step(found: StepFound): Json =
            record(
                "graph" to text(found.graph),
                "step" to text(found.step),
                "load_ms" to Json.numbers(found.loadMs),
                "warmup_ms" to Json.numbers(found.warmupMs),
                "run_ms" to Json.numbers(found.runMs),
                "trouble" to found.trouble?.let(::why),
            )

        private fun answer(found: AnswerFound): Json =
            record(
                "ids" to Json.Items(found.ids.map(::whole)),
                "cache_bytes" to found.cacheBytes?.let(::whole),
                "image_tokens_before" to whole(found.imageTokensBefore),
                "image_tokens_after" to whole(found.imageTokensAfter),
                "question_tokens" to whole(found.questionTokens),
                "runs" to Json.Items(found.runs.map(::run)),
                "trouble" to found.trouble?.let(::why),
            )

        private fun run(run: AnswerRun): Json =
            record(
                "twin" to Json.Flag(run.twin),
                "warmup" to Json.Flag(run.warmup),
                "preprocess_ms" to Json.Real(run.preprocessMs),
                "vision_ms" to Json.Real(run.times.vision),
                "image_prefill_ms" to Json.Real(run.times.imagePrefill),
                "image_ready_ms" to Json.Real(run.times.imageReady),
                "question_prefill_ms" to Json.Real(run.times.questionPrefill),
                "ttft_question_ms" to Json.Real(run.times.ttftQuestion),
                "ttft_photo_ms" to Json.Real(run.ttftPhotoMs),
                "token_ms" to Json.numbers(run.times.tokens),
            )
    }
}

/** Of a text, at most so many characters. */
internal fun shortened(text: String, most: Int): String =
    if (text.codePointCount(0, text.length) <= most) text else text.substring(0, text.offsetByCodePoints(0, most))

/** `benchmark_results.json`, in the shape that ExecuTorch's minibench leaves. */
object Minibench {
    /** Medians of what was found; nothing for what was not timed. */
    fun entries(findings: Findings, manifest: Manifest, availableBytes: Long): Json {
        val device =
            Json.of(
                "device" to Json.Text(findings.device.name),
                "arch" to Json.Text(findings.device.abi),
                "os" to Json.Text(findings.device.os),
                "totalMem" to Json.Whole(findings.device.ramBytes),
                "availMem" to Json.Whole(availableBytes),
            )

        fun entry(name: String, metric: String, samples: List<Double>): Json? {
            val value = median(samples) ?: return null
            return Json.of(
                "benchmarkModel" to
                    Json.of(
                        "name" to Json.Text(name),
                        "backend" to Json.Text(manifest.backend),
                        "quantization" to Json.Text(manifest.quantisation),
                    ),
                "metric" to Json.Text(metric),
                "actualValue" to Json.Real(value),
                "targetValue" to Json.Real(0.0),
                "deviceInfo" to device,
            )
        }
        val name = manifest.name
        val runs = findings.answer?.runs.orEmpty().filter { !it.warmup && !it.twin }
        val steps =
            findings.steps.map {
                val called = if (it.step == it.graph) it.graph else "${it.graph}@${it.step}"
                entry("$name/$called", "inference_time(ms)", it.runMs)
            }
        val speeds = runs.flatMap { it.times.tokens }.filter { it > 0 }.map { 1000 / it }
        val whole =
            listOf(
                entry(name, "model_load_time(ms)", findings.load.laterMs.ifEmpty { findings.load.firstMs }),
                entry(name, "image_ready(ms)", runs.map { it.times.imageReady }),
                entry(name, "time_to_first_token(ms)", runs.map { it.ttftPhotoMs }),
                entry(name, "token_per_sec", speeds),
            )
        return Json.Items((steps + whole).filterNotNull())
    }
}

fun median(samples: List<Double>): Double? {
    if (samples.isEmpty()) return null
    val sorted = samples.sorted()
    return (sorted[(sorted.size - 1) / 2] + sorted[sorted.size / 2]) / 2
}
