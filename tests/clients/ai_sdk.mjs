// Asks a server through the AI SDK and prints one JSON object: node ai_sdk.mjs KIND URL
// KIND: responses, chat, compatible, anthropic; URL: the server's address.
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { Output, generateText, jsonSchema, stepCountIs, streamText, tool } from 'ai';

globalThis.AI_SDK_LOG_WARNINGS = false;
const [kind, url, scenario] = process.argv.slice(2);
const options = { baseURL: `${url}/v1`, apiKey: 'none' };
const model = {
  responses: () => createOpenAI(options).responses('gpt-oss-20b'),
  chat: () => createOpenAI(options).chat('gpt-oss-20b'),
  compatible: () =>
    createOpenAICompatible({ ...options, name: 'mlx-gptoss', includeUsage: true, supportsStructuredOutputs: true })(
      'gpt-oss-20b',
    ),
  anthropic: () => createAnthropic(options)('gpt-oss-20b'),
}[kind]();
const providerOptions = {
  openai: { forceReasoning: true, reasoningEffort: 'low', reasoningSummary: 'auto' },
  anthropic: { thinking: { type: 'enabled', budgetTokens: 1024 } },
};
const get_weather = tool({
  description: 'Get the current weather.',
  inputSchema: jsonSchema({
    type: 'object',
    properties: { location: { type: 'string', description: 'City name' } },
    required: ['location'],
  }),
  execute: async ({ location }) => `4 degrees in ${location}`,
});
const scenarios = {
  tool: async () => {
    const prompt = 'What is the weather in Oslo?';
    const asked = { model, prompt, providerOptions, tools: { get_weather }, stopWhen: stepCountIs(3) };
    const { text, steps } = await generateText(asked);
    const called = steps.flatMap((step) => step.toolCalls.map((call) => [call.toolName, call.input]));
    return { text, called, reasoning: steps.map((step) => step.reasoningText ?? null) };
  },
  stream: async () => {
    const result = streamText({ model, prompt: 'What is 2 + 2?', providerOptions });
    let text = '';
    let reasoning = '';
    for await (const part of result.fullStream) {
      if (part.type === 'error') throw part.error;
      if (part.type === 'text-delta') text += part.text;
      if (part.type === 'reasoning-delta') reasoning += part.text;
    }
    const usage = await result.usage;
    return { text, reasoning, outputTokens: usage.outputTokens };
  },
  object: async () => {
    const schema = jsonSchema({
      type: 'object',
      properties: { answer: { type: 'string' } },
      required: ['answer'],
      additionalProperties: false,
    });
    const { output } = await generateText({
      model,
      prompt: 'What is the capital of Norway?',
      output: Output.object({ schema }),
    });
    return { output };
  },
};
console.log(JSON.stringify(await scenarios[scenario]()));
