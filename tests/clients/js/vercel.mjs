// Vercel's AI SDK with its two providers: generateText, streamText and generateObject, each with a picture, and a tool.
import assert from "node:assert/strict"
import { createOpenAI } from "@ai-sdk/openai"
import { createOpenAICompatible } from "@ai-sdk/openai-compatible"
import { generateObject, generateText, streamText, tool } from "ai"
import { z } from "zod"

const { baseURL, model: name, url, question, answer } = JSON.parse(process.argv[2])
const schema = z.object({ color: z.enum(["red", "green", "blue", "white"]), large: z.boolean() })
const messages = [{ role: "user", content: [{ type: "image", image: url }, { type: "text", text: question }] }]
const compatible = createOpenAICompatible({ name: "espalier", baseURL, supportsStructuredOutputs: true })
const openai = createOpenAI({ baseURL, apiKey: "none" })

for (const model of [compatible(name), openai.chat(name), openai.responses(name)]) {
  const { text, usage } = await generateText({ model, messages })
  assert.equal(text, answer)
  assert.ok(usage.inputTokens > 0 && usage.outputTokens > 0)
  let streamed = ""
  for await (const piece of streamText({ model, messages }).textStream) streamed += piece
  assert.equal(streamed, answer)
  schema.parse((await generateObject({ model, messages, schema })).object)
  const tools = { paint: tool({ inputSchema: schema }) }
  const { toolCalls } = await generateText({ model, messages, tools, toolChoice: "required" })
  schema.parse(toolCalls[0].input)
}
