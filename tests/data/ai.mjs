// What the npm packages ai and @ai-sdk/openai-compatible do with our answers. Of two servers, the
// first one has a model, which breaks off answers of 7 tokens, the second one the script of tests/extras/api/test_npm_clients.py.
// Usage: node ai.mjs BASE_URL BASE_URL
import assert from 'node:assert/strict';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, Output, generateText, isStepCount, streamText, tool } from 'ai';
import { z } from 'zod';

const [model, scripted] = process.argv.slice(2).map((baseURL) => createOpenAICompatible({
  name: 'local', baseURL, apiKey: 'any', includeUsage: true, supportsStructuredOutputs: true,
})('tiny'));
const prompt = 'How is it in Bern?';
const short = { model, prompt, maxOutputTokens: 9, temperature: 0, maxRetries: 0 };

const whole = await generateText(short);
const streamed = streamText(short);
const pieces = [];
for await (const piece of streamed.textStream) pieces.push(piece);
assert.equal(pieces.join(''), whole.text);
for (const one of [whole, streamed]) {
  const usage = await one.usage;
  assert.ok(usage.inputTokens > 0 && 0 < usage.outputTokens && usage.outputTokens <= 9);
  assert.ok(['stop', 'length'].includes(await one.finishReason));
}

const broken = streamText({ ...short, maxOutputTokens: 7, onError() {} });
const kinds = [];
for await (const part of broken.stream) kinds.push(part.type);
assert.ok(kinds.includes('error'));
assert.ok(kinds.includes('text-delta'));

const schema = z.object({ visited: z.boolean(), rank: z.enum(['low', 'high']) });
const form = { model, prompt, maxRetries: 0, output: Output.object({ schema }) };
const { output } = await generateText(form);
assert.deepEqual(schema.parse(output), output);
const later = await streamText(form).output;
assert.deepEqual(schema.parse(later), later);

const asked = [];
const weather = tool({
  description: 'The weather in a city',
  inputSchema: z.object({ city: z.string().max(8) }),
  execute: async ({ city }) => { asked.push(city); return `${city}: sunny`; },
});
const tools = { weather };
const { toolCalls } = await generateText({ model, prompt, tools, toolChoice: 'required',
  maxRetries: 0 });
assert.ok(toolCalls.length > 0 && toolCalls.every((call) => call.toolName === 'weather'));

const trip = { model: scripted, prompt, tools, stopWhen: isStepCount(3), maxRetries: 0 };
asked.length = 0;
for (const answer of [await generateText(trip), streamText(trip)]) {
  assert.equal(await answer.text, 'Bern is sunny.');
  assert.equal((await answer.steps).length, 2);
}
assert.deepEqual(asked, ['Bern', 'Bern']);

await assert.rejects(generateText({ ...short, temperature: 3 }), (error) =>
  APICallError.isInstance(error) && error.statusCode === 400 && !error.isRetryable
    && /temperature/.test(error.message));
await assert.rejects(generateText({ ...trip, maxRetries: 0 }), (error) =>
  APICallError.isInstance(error) && error.statusCode === 429 && error.isRetryable);
console.log('all good');
