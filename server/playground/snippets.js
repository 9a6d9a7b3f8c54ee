// The request on the page, to run elsewhere. Pictures are read from the file, so that the text stays readable.

const PICTURE = "PICTURE_DATA_URL";

// `body`'s picture is replaced by what reads `file`.
function withoutPicture(body) {
  const replace = (part) => (part.type === "image_url" ? { type: "image_url", image_url: { url: PICTURE } } : part);
  const messages = body.messages.map(({ role, content }) => ({ role, content: Array.isArray(content) ? content.map(replace) : content }));
  return { ...body, messages };
}

export function curl(body, file, type, base, hasKey) {
  // The document is unquoted, so that the shell puts the picture in; what else it would expand is escaped.
  const json = JSON.stringify(withoutPicture(body), null, 2).replace(/[\\$`]/g, "\\$&");
  const name = `'${file.replaceAll("'", "'\\''")}'`;
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $OPENAI_API_KEY"` : "";
  const data = json.replace(PICTURE, () => `data:${type};base64,$(base64 -w0 < ${name})`);
  return `curl ${base}v1/chat/completions -H 'Content-Type: application/json'${key} -d @- <<END\n${data}\nEND`;
}

export function python(body, file, type, base, hasKey) {
  const { model, messages, pruning } = withoutPicture(body);
  const said = JSON.stringify(messages, null, 4).replace(`"${PICTURE}"`, () => `f"data:${type};base64,{picture}"`);
  return `import base64, ${hasKey ? "os, " : ""}openai

client = openai.OpenAI(base_url="${base}v1", api_key=${hasKey ? 'os.environ["OPENAI_API_KEY"]' : '"none"'})
picture = base64.b64encode(open(${JSON.stringify(file)}, "rb").read()).decode()
reply = client.chat.completions.create(
    model=${JSON.stringify(model)},
    messages=${said.replaceAll("\n", "\n    ")},
    extra_body={"pruning": {"level": ${JSON.stringify(pruning.level)}}},
)
print(reply.choices[0].message.content, reply.pruning)`;
}
