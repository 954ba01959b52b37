// A completion for human eyes: plain text, or the turns of an episode with its calls of tools. What is not trained on, being
// somebody else's words, is grey.

const OWN = "assistant";

function words(content) {
  if (content === null || content === undefined) return "";
  if (typeof content === "string") return content;
  if (Array.isArray(content)) return content.map((part) => part.text ?? JSON.stringify(part)).join("\n");
  return JSON.stringify(content);
}

function pretty(value) {
  return typeof value === "string" ? value : JSON.stringify(value, null, 1).replace(/\n\s*/g, " ");
}

function message(one) {
  const calls = (one.tool_calls ?? []).map((call) => el("div", { class: "call" }, el("b", null, call.function?.name ?? "?"), el("code", null, pretty(call.function?.arguments ?? ""))));
  const thinking = one.thinking ?? one.reasoning_content;
  const said = words(one.content);
  return el("div", { class: `message ${one.role === OWN ? "own" : "masked"}` },
    el("span", { class: "role" }, one.role, one.name && ` · ${one.name}`),
    thinking && el("details", { class: "thinking" }, el("summary", null, "thinking"), el("pre", null, words(thinking))),
    said && el("pre", null, said),
    calls);
}

function chat(messages) {
  return el("div", { class: "chat" }, messages.map(message));
}

/** One of the conversations of an agent that had several. */
function conversation({ prompt, messages }, number) {
  return el("section", { class: "conversation" }, el("span", { class: "role" }, `conversation ${number + 1}`), chat([...prompt, ...messages]));
}

/** The prompt of a group, with the answer and the other columns of its row. */
function promptView(prompt) {
  const columns = Object.entries(prompt.columns ?? {}).sort(([a], [b]) => (b === "answer") - (a === "answer"));
  return el("div", { class: "prompt" },
    prompt.messages ? chat(prompt.messages) : el("div", { class: "message masked" }, el("span", { class: "role" }, "prompt"), el("pre", null, prompt.text ?? "")),
    columns.length > 0 && el("dl", { class: "columns" }, columns.map(([name, value]) => [el("dt", null, name), el("dd", null, pretty(value))])));
}

/** What a completion says, in one line. */
function snippet(row) {
  const last = row.messages?.findLast((one) => one.role === OWN);
  return (last ? words(last.content) || pretty(last.tool_calls ?? "") : row.completion ?? "").replace(/\s+/g, " ").trim();
}

/** One completion as a card. `facts` come from the index, `row` from its chunk. */
function completionCard(title, facts, row, more) {
  const rewards = Object.entries(row.rewards).filter(([name]) => Object.keys(row.rewards).length > 1 || row.rewards[name] !== facts.reward);
  const told = row.info && Object.keys(row.info).length > 0;
  return el("article", { class: `completion ${more?.chosen ? "chosen" : ""}` },
    el("header", null,
      el("b", null, title),
      el("span", { class: "reward", style: `--at:${rewardPlace(facts.reward)}` }, `reward ${short(facts.reward)}`),
      facts.advantage !== null && facts.advantage !== undefined && el("span", { class: facts.advantage > 0 ? "up" : facts.advantage < 0 ? "down" : "" }, `advantage ${facts.advantage > 0 ? "+" : ""}${short(facts.advantage)}`),
      el("span", null, `${short(facts.tokens)} tokens`),
      facts.turns > 1 && el("span", null, `${facts.turns} turns`),
      el("span", { class: `stop ${facts.stop}` }, facts.stop)),
    rewards.length > 0 && el("div", { class: "parts" }, rewards.map(([name, value]) => el("span", null, `${name} ${short(value)}`))),
    more?.tokens ?? row.conversations?.map(conversation) ?? (row.messages ? chat(row.messages) : el("pre", { class: "own" }, row.completion ?? "")),
    more?.note && el("small", null, more.note),
    told && el("details", null, el("summary", null, "what the environment told"), el("pre", null, JSON.stringify(row.info, null, 1))));
}

/** From 0 to 1: where a reward stands between the lowest and the highest that are looked at. */
let rewardRange = [0, 1];

function rewardPlace(value) {
  if (value === null || value === undefined) return 0.5;
  const [low, high] = rewardRange;
  return high > low ? Math.max(0, Math.min(1, (value - low) / (high - low))).toFixed(3) : 0.5;
}
