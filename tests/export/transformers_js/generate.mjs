// Answers a list of questions in Node on the CPU: node generate.mjs '[{"model": ..., "photo": ..., ...}]' > answers.json

import * as transformers from "@huggingface/transformers";
import { answer } from "./answer.mjs";

transformers.env.allowRemoteModels = false;
const answers = [];
for (const request of JSON.parse(process.argv[2])) answers.push(await answer(transformers, request));
process.stdout.write(JSON.stringify(answers));
