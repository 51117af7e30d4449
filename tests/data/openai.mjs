// What the npm package `openai` does with our answers. Usage: node openai.mjs BASE_URL MODEL
import assert from 'node:assert/strict';
import OpenAI from 'openai';

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: 'any', maxRetries: 0 });
const messages = [{ role: 'user', content: 'hello' }];
const request = { model, messages, max_tokens: 9, seed: 5, n: 2 };

const whole = await client.chat.completions.create(request);
assert.equal(whole.choices.length, 2);
assert.equal(whole.usage.completion_tokens, 18);

const texts = ['', ''];
const stream = await client.chat.completions.create({ ...request, stream: true });
for await (const { choices } of stream) texts[choices[0].index] += choices[0].delta.content ?? '';
assert.deepEqual(texts, whole.choices.map((choice) => choice.message.content));

const helper = client.chat.completions.stream(request);  // refuses a choice without an end
const final = await helper.finalChatCompletion();
assert.deepEqual(final.choices.map((choice) => choice.message.content), texts);

const left = await client.chat.completions.create({ ...request, max_tokens: 200, stream: true });
for await (const _ of left) break;  // hangs up

const names = [];
for await (const each of client.models.list()) names.push(each.id);
assert.deepEqual(names, [model]);
assert.equal((await client.models.retrieve(model)).id, model);

const completion = await client.completions.create({ model, prompt: 'the quick', seed: 1 });
assert.equal(completion.usage.completion_tokens, 16);

await assert.rejects(client.chat.completions.create({ ...request, temperature: 3 }), (error) =>
  error instanceof OpenAI.BadRequestError && error.param === 'temperature');
await assert.rejects(client.chat.completions.create({ ...request, model: 'gpt-4o' }),
  OpenAI.NotFoundError);

console.log('all good');
