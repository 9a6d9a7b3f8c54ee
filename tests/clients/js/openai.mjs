// OpenAI's client for JavaScript: answers whole, streamed and parsed, function calls, responses.
import assert from "node:assert/strict"
import OpenAI from "openai"
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod"
import { z } from "zod"

const { baseURL, model, url, question, answer } = JSON.parse(process.argv[2])
const Star = z.object({ color: z.enum(["red", "green", "blue", "white"]), large: z.boolean() })
const messages = [{ role: "user", content: [{ type: "image_url", image_url: { url } }, { type: "text", text: question }] }]
const input = [{ role: "user", content: [{ type: "input_image", image_url: url, detail: "auto" }, { type: "input_text", text: question }] }]
const client = new OpenAI({ baseURL, apiKey: "none" })

assert.equal((await client.chat.completions.create({ model, messages })).choices[0].message.content, answer)

let streamed = ""
for await (const chunk of await client.chat.completions.create({ model, messages, stream: true })) streamed += chunk.choices[0]?.delta?.content ?? ""
assert.equal(streamed, answer)

const parsed = await client.chat.completions.parse({ model, messages, response_format: zodResponseFormat(Star, "star") })
Star.parse(parsed.choices[0].message.parsed)

const tools = [zodFunction({ name: "paint", parameters: Star })]
const called = await client.chat.completions.parse({ model, messages, tools, tool_choice: "required" })
Star.parse(called.choices[0].message.tool_calls[0].function.parsed_arguments)

assert.equal((await client.responses.create({ model, input })).output_text, answer)
Star.parse((await client.responses.parse({ model, input, text: { format: zodTextFormat(Star, "star") } })).output_parsed)
const events = []
for await (const event of await client.responses.create({ model, input, stream: true })) events.push(event.type)
assert.equal(events[0], "response.created")
assert.equal(events.at(-1), "response.completed")

assert.equal((await client.completions.create({ model, prompt: "A red star is", max_tokens: 4 })).object, "text_completion")
await assert.rejects(client.chat.completions.create({ model: "none", messages }), OpenAI.NotFoundError)
