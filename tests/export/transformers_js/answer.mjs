// One question about one photo, asked as the documentation of transformers.js asks; runs in Node and in a browser.

export async function answer(transformers, { model, photo, question, tokens }) {
  const { AutoModelForImageTextToText, AutoProcessor, load_image } = transformers;
  const processor = await AutoProcessor.from_pretrained(model);
  const llava = await AutoModelForImageTextToText.from_pretrained(model);
  const content = [{ type: "image" }, { type: "text", text: question }];
  const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const inputs = await processor(await load_image(photo), prompt);
  const output = await llava.generate({ ...inputs, max_new_tokens: tokens, do_sample: false });
  const prompt_ids = inputs.input_ids.tolist()[0].map(Number);
  const answer_ids = output.tolist()[0].slice(prompt_ids.length).map(Number);
  return {
    version: transformers.env.version,
    prompt_ids,
    answer_ids,
    answer: processor.decode(answer_ids, { skip_special_tokens: true }),
    pixel_shape: inputs.pixel_values.dims,
    pixel_values: Array.from(inputs.pixel_values.data),
  };
}
