// What a phone reads of a bundle's manifest.json, at one of its keeps.

package io.pruneport.core

import java.io.File

/** Name, shape and dtype of one input or output; the axes in [dynamic] may be shorter than [shape] says. */
data class TensorInfo(val name: String, val dtype: DType, val shape: List<Int>, val dynamic: Set<Int> = emptySet()) {
    /** True for a tensor of the dtype and of a shape that this allows. */
    fun fits(tensor: Tensor): Boolean =
        tensor.dtype == dtype && tensor.shape.size == shape.size &&
            shape.indices.all {
                tensor.shape[it] == shape[it] || (it in dynamic && tensor.shape[it] in 1 until shape[it])
            }

    /** Throws Trouble for a tensor that is not of this dtype, or of a shape that this does not allow. */
    fun check(tensor: Tensor, graph: String) {
        if (!fits(tensor)) {
            throw Trouble("$graph: $name is ${dtype.word} $shape, not ${tensor.dtype.word} ${tensor.shape}")
        }
    }

    companion object {
        fun of(json: Json, place: String): TensorInfo {
            val fields = Fields(json, place)
            val stated = fields.text("dtype")
            val dtype =
                DType.entries.firstOrNull { it.word == stated }
                    ?: throw Trouble("$place.dtype is $stated, which is not exchanged")
            val shape = fields.wholes("shape", 1..Int.MAX_VALUE)
            Tensor.count(shape)
            val dynamic = fields.optionalWholes("dynamic", 0..maxOf(0, shape.size - 1)).toSet()
            return TensorInfo(fields.name("name"), dtype, shape, dynamic)
        }
    }
}

/**
 * One exported graph: its files, the engine it is for, its inputs and outputs in order.
 *
 * [name] is what the keep at hand calls it, [stored] what its file calls it. [sharesFile] where the file holds other
 * graphs, too, be it those of other keeps.
 */
data class GraphInfo(
    val name: String,
    val file: String,
    val engine: String,
    val inputs: List<TensorInfo>,
    val outputs: List<TensorInfo>,
    val stored: String = name,
    val extraFiles: List<String> = emptyList(),
    val states: List<TensorInfo> = emptyList(),
    val sharesFile: Boolean = false,
) {
    /** The KV cache, be it inputs or states. */
    val cache: List<TensorInfo> get() = (inputs + states).filter { it.name.startsWith("past_") }

    fun input(name: String): TensorInfo =
        inputs.firstOrNull { it.name == name } ?: throw Trouble("${this.name} has no $name")

    fun output(name: String): TensorInfo =
        outputs.firstOrNull { it.name == name } ?: throw Trouble("${this.name} has no $name")

    companion object {
        internal fun of(json: Json, place: String, vision: String, sharing: Set<String>): GraphInfo {
            val fields = Fields(json, place)
            val stored = fields.name("name")
            val file = plainPath(fields.text("file"), place)
            val made =
                GraphInfo(
                    name = if (stored == vision) GraphName.VISION else stored,
                    file = file,
                    engine = fields.name("engine"),
                    inputs = fields.objects("inputs", TensorInfo::of),
                    outputs = fields.objects("outputs", TensorInfo::of),
                    stored = stored,
                    extraFiles = fields.texts("extra_files").map { plainPath(it, place) },
                    states = fields.optionalObjects("states", TensorInfo::of),
                    sharesFile = file in sharing,
                )
            if (made.inputs.isEmpty() || made.outputs.isEmpty()) throw Trouble("$place has no inputs or no outputs")
            for (infos in listOf(made.inputs + made.states, made.outputs)) {
                if (infos.distinctBy { it.name }.size != infos.size) throw Trouble("$place names two tensors alike")
            }
            return made
        }
    }
}

/** What the graphs are called. */
object GraphName {
    const val VISION = "vision_encoder"
    const val EMBEDDING = "token_embedding"
    const val IMAGE_PREFILL = "image_prefill"
    const val TEXT_PREFILL = "text_prefill"
    const val TEXT_DECODER = "text_decoder"
    const val FRONT = "decoder_front"
    const val BACK = "decoder_back"
    const val HEAD = "lm_head"
}

enum class Resample { BICUBIC, BILINEAR, LANCZOS, NEAREST }

/** How a photo becomes pixel values. */
data class ImageInfo(
    val height: Int,
    val width: Int,
    val resizeShortest: Int,
    val rescale: Float,
    val mean: List<Float>,
    val std: List<Float>,
    val resample: Resample,
    val centreCrop: Boolean,
) {
    companion object {
        private val positive = 1e-30..1e30

        fun of(fields: Fields): ImageInfo {
            val size = fields.wholes("size", 1..8192)
            if (size.size != 2) throw Trouble("${fields.place}.size is not height and width")
            val shortest = fields.whole("resize_shortest", 1..8192)
            val resample = fields.text("resample", default = "bicubic")
            val colour = fields.text("color", default = "RGB")
            if (colour != "RGB") throw Trouble("${fields.place}.color is $colour")
            val crop = fields.flag("do_center_crop", default = true)
            if (crop && shortest < size.max()) {
                throw Trouble("${fields.place}: the crop would reach outside of the photo")
            }
            return ImageInfo(
                height = size[0],
                width = size[1],
                resizeShortest = shortest,
                rescale = fields.number("rescale", positive).toFloat(),
                mean = fields.numbers("mean", -1e30..1e30, 3).map { it.toFloat() },
                std = fields.numbers("std", positive, 3).map { it.toFloat() },
                resample =
                    Resample.entries.firstOrNull { it.name.lowercase() == resample }
                        ?: throw Trouble("${fields.place}.resample is $resample"),
                centreCrop = crop,
            )
        }
    }
}

/** The conversation around the image; [suffixText] is null where only the chat template can write what follows it. */
data class PromptInfo(val suffixText: String?, val trimsQuestion: Boolean, val image: Int?) {
    companion object {
        fun of(fields: Fields): PromptInfo {
            val special = fields.optionalFields("special_ids")
            return PromptInfo(
                suffixText = if (fields.optional("suffix_text") == null) null else fields.text("suffix_text"),
                trimsQuestion = fields.flag("trims_question", default = false),
                image = if (special?.optional("image") == null) null else special.whole("image", 0..Int.MAX_VALUE),
            )
        }
    }
}

/** How many image tokens there are and are left, the first layer that sees fewer, and the photo's rows and columns. */
data class PruneInfo(val imageTokens: Int, val keep: Int, val cut: Int, val rows: Int, val columns: Int) {
    companion object {
        fun of(fields: Fields): PruneInfo {
            val tokens = fields.whole("image_tokens", 1..Int.MAX_VALUE)
            val grid = fields.wholes("grid", 1..Int.MAX_VALUE)
            if (grid.size != 2 || grid[0].toLong() * grid[1] != tokens.toLong()) {
                throw Trouble("${fields.place}.grid does not hold the $tokens image tokens")
            }
            return PruneInfo(tokens, fields.whole("keep", 1..tokens), fields.whole("cut", 0..10_000), grid[0], grid[1])
        }
    }
}

/** How text goes through the text graphs. */
data class TextInfo(val tokens: Int, val chunk: Int, val endIds: Set<Int>) {
    companion object {
        fun of(fields: Fields) =
            TextInfo(
                fields.whole("tokens", 1..Int.MAX_VALUE),
                fields.whole("chunk", 1..Int.MAX_VALUE),
                fields.optionalWholes("end_ids", 0..Int.MAX_VALUE).toSet(),
            )
    }
}

/** Which of several keeps to read. */
sealed class Choice {
    /** The first, or the only one there is. */
    object Standard : Choice()

    data class Keep(val keep: Int) : Choice()

    /** The one whose vision graph its file calls so. */
    data class Vision(val graph: String) : Choice()
}

/** manifest.json at one keep; [keeps] are all there are, the default first. [files] are sizes by path. */
data class Manifest(
    val name: String,
    val model: String,
    val backend: String,
    /** Schemes of the parts, such as `int8 / int4`; the precision of what has none. */
    val quantisation: String,
    val prune: PruneInfo,
    val keeps: List<Int>,
    val graphs: List<GraphInfo>,
    val image: ImageInfo,
    val prompt: PromptInfo,
    val before: Int,
    val firstText: Int,
    val text: TextInfo?,
    val files: Map<String, Long>,
) {
    fun graph(name: String): GraphInfo? = graphs.firstOrNull { it.name == name }

    /** Throws Trouble where a file of a graph is not there in the size that the manifest states. */
    fun checkFiles(folder: File) {
        for (path in graphs.flatMap { listOf(it.file) + it.extraFiles }.distinct()) {
            val stated = files[path] ?: throw Trouble("$FILE does not list $path")
            val file = File(folder, path)
            if (!file.isFile) throw Trouble("$path is missing")
            val size = file.length()
            if (size != stated) throw Trouble("$path has $size bytes, not $stated: copy the bundle again")
        }
    }

    companion object {
        const val SCHEMA_VERSION = 2
        const val FILE = "manifest.json"
        private const val LARGEST = 16 shl 20

        /** Reads the manifest of the bundle in a folder. Throws Trouble. */
        fun read(folder: File, choice: Choice = Choice.Standard): Manifest =
            of(Json.read(File(folder, FILE), LARGEST), choice)

        fun of(json: Json, choice: Choice = Choice.Standard): Manifest {
            val fields = Fields(json, FILE)
            val version = fields.whole("schema_version", 0..Int.MAX_VALUE)
            if (version != SCHEMA_VERSION) {
                throw Trouble(
                    "the bundle is of schema version $version, this app reads $SCHEMA_VERSION; use app and bundle of " +
                        "one release",
                )
            }
            val name = fields.name("name")
            if (fields.fields("image").optional("tiles") != null) {
                throw Trouble("$name sees a photo in tiles, which this app cannot cut; export it without --image-size")
            }
            val listed =
                fields.optionalObjects("keeps") { entry, place ->
                    Fields(entry, place).let { PruneInfo.of(it.fields("prune")) to it.name("graph") }
                }
            val all = listed.ifEmpty { listOf(PruneInfo.of(fields.fields("prune")) to GraphName.VISION) }
            val keeps = all.map { it.first.keep }
            val own =
                all.firstOrNull { (prune, graph) ->
                    when (choice) {
                        Choice.Standard -> true
                        is Choice.Keep -> prune.keep == choice.keep
                        is Choice.Vision -> graph == choice.graph
                    }
                } ?: throw Trouble("$name has the keeps ${keeps.joinToString()}, not what was asked for")
            val target = fields.fields("target")
            val precision = target.text("precision")
            val schemes = listOf("quant_vision", "quant_text").map { target.text(it, default = precision) }
            val frame = fields.fields("frame")
            val sizes = if (fields.optional("files") == null) emptyMap() else fields.members("files")
            return Manifest(
                name = name,
                model = fields.name("model"),
                backend = target.name("backend"),
                quantisation = schemes.distinct().joinToString(" / "),
                prune = own.first,
                keeps = keeps,
                graphs = graphs(fields, own.second, all.map { it.second }.toSet() - own.second),
                image = ImageInfo.of(fields.fields("image")),
                prompt = PromptInfo.of(fields.fields("prompt")),
                before = frame.whole("before", 0..Int.MAX_VALUE),
                firstText = frame.whole("first_text", 1..Int.MAX_VALUE),
                text = fields.optionalFields("text")?.let { TextInfo.of(it) },
                files =
                    sizes.entries.associate { (path, info) ->
                        val place = "$FILE.files"
                        plainPath(path, place) to
                            Fields(info, "$place.$path").long("size_bytes", 0..(1L shl 53))
                    },
            )
        }

        /** Those that run with one vision graph, without the vision graphs of other keeps. */
        private fun graphs(fields: Fields, vision: String, others: Set<String>): List<GraphInfo> {
            val entries = fields.list("graphs", longest = 1000)
            val counts =
                entries.mapIndexed { number, entry -> Fields(entry, "$FILE.graphs[$number]").text("file") }
                    .groupingBy { it }.eachCount()
            val sharing = counts.filterValues { it > 1 }.keys
            val graphs =
                entries.mapIndexed { number, entry -> GraphInfo.of(entry, "$FILE.graphs[$number]", vision, sharing) }
                    .filter { it.stored !in others }
            if (graphs.isEmpty() || graphs.distinctBy { it.name }.size != graphs.size) {
                throw Trouble("$FILE has no graphs, or two of one name")
            }
            return graphs
        }
    }
}

/** A path that stays inside a folder. Throws Trouble for any other. */
internal fun plainPath(path: String, place: String): String {
    val plain =
        path.length <= 512 && path.split("/").none { it == "" || it == "." || it == ".." } &&
            path.none { it == '\\' || it == ':' || it < ' ' }
    if (!plain) throw Trouble("$place names ${path.take(100)}, which is no plain path inside the bundle")
    return path
}
