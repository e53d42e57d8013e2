// The page of the service: plain DOM, no library, no request to anywhere else.
// Titles and names come from the customer's data: they are written as text nodes only, never as markup.

const N = 12;                        // fills rows of 2, 3 and 4 cards
const EVERY = 5000;                  // milliseconds between two looks at the live figures
const $ = id => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");

// ---------------------------------------------------------------------------------------------- words

const RUNGS = [
  ["personalised", "Personal", "From everything this person has had, newest feedback included."],
  ["session", "This visit", "There is no history to learn from, so what is in the basket decides."],
  ["content", "Alike", "Nothing is known of these items' buyers, so their kind decides."],
  ["segment", "Group", "What is popular with people of the same group, or in the same category."],
  ["popular", "Popular", "What most people take: the model knows nothing nearer to this person."],
];
const NEXT = "What this person most likely takes next: taste and habit together, own items included.";
const wordsOf = source => source === "next_purchase" ? NEXT : (RUNGS.find(([name]) => name === source) ?? [])[2] ?? `Answered by “${source}”.`;
const RUNG_NAMES = {next_purchase: "Next purchase", similar: "Similar items", ...Object.fromEntries(RUNGS.map(([name, short]) => [name, short]))};
const RULES = {
  "already seen": "this person has had it already",
  "denied": "it is marked as not interesting",
  "not available or without interactions": "it is not available, or nobody has had it yet",
};
const SIGNALS = {
  taste: "Taste", popularity: "Popular over the years", recent_popularity: "Popular lately", own: "Had it before", count: "How often",
  recency: "How recently", count_recency: "Often and recently", repeat: "Something people buy again",
  lateness: "Due again", lateness_squared: "How far from due", interval: "How often it comes round",
  people_alike: "Popular with people alike", average_taste: "Against the average item, by taste", average_content: "Against the average item, by description",
};
const STATUS = {401: "A key is needed", 403: "Not allowed", 404: "Not found", 413: "Too large", 422: "Not understood", 429: "Too many requests", 500: "A fault in the service", 503: "Not ready"};

const number = new Intl.NumberFormat("en");
const percent = new Intl.NumberFormat("en", {style: "percent", maximumFractionDigits: 0});
const relative = new Intl.RelativeTimeFormat("en", {numeric: "auto"});
const dayOf = date => date.toLocaleDateString("en", {day: "numeric", month: "short", year: "numeric"});
const plural = (n, one, many = one + "s") => `${number.format(n)} ${n === 1 ? one : many}`;

// "BAKED BREAD/BUNS" is how a till writes; a page does not shout
function tidy(text) {
  if (text === null || text === undefined || text === "") return "";
  const string = String(text);
  return string.length > 3 && string === string.toUpperCase() && /\p{L}/u.test(string) ? string[0] + string.slice(1).toLowerCase() : string;
}
const nameOf = item => item.title || `Item ${item.item_id}`;
const categoryOf = item => tidy(item.category ?? item.attributes?.category);

// a time without a zone is a time of the data, which has none: shown as it stands
function moment(text) {
  const date = new Date(text);
  return text && !Number.isNaN(date.getTime()) ? date : null;
}
function ago(date) {
  const seconds = (date.getTime() - Date.now()) / 1000;
  if (seconds > -45) return "just now";
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]])
    if (-seconds >= size) return -seconds > 60 * 86400 ? dayOf(date) : relative.format(Math.round(seconds / size), unit);
  return "a minute ago";
}
function duration(seconds) {
  if (seconds < 1) return `${seconds < .01 ? (seconds * 1000).toFixed(1) : Math.round(seconds * 1000)} ms`;
  return `${seconds.toFixed(1)} s`;
}

// ---------------------------------------------------------------------------------------------- small tools

// an id above 2**53 must come back as it was
const reading = (key, value, context) => typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source ?? "") ? BigInt(context.source) : value;
const writing = (key, value) => typeof value !== "bigint" ? value : JSON.rawJSON ? JSON.rawJSON(String(value)) : Number(value);
const keyOf = id => `${typeof id === "string" ? "s" : "n"}:${id}`;

function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, does] of Object.entries(value)) element.addEventListener(event, does);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined && child !== false));
  return element;
}
function vector(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function hash(text) {
  let found = 2166136261;
  for (const letter of String(text)) found = Math.imul(found ^ letter.codePointAt(0), 16777619);
  return (found ^ found >>> 15) >>> 0;
}

// ---------------------------------------------------------------------------------------------- tiles: a picture where there is none

const SHAPES = [
  k => [["circle", {cx: 30 + k % 30, cy: 20, r: 46}], ["circle", {cx: 132, cy: 92 - k % 20, r: 40}]],
  k => [["path", {d: `M-10 ${78 - k % 18}C30 ${40 + k % 12} 60 ${104 - k % 14} 100 70S150 44 172 64V110H-10Z`}]],
  k => [0, 1, 2, 3].map(i => ["path", {d: `M${-60 + i * 62 + k % 20} 110L${10 + i * 62 + k % 20} -10h26L${-34 + i * 62 + k % 20} 110Z`}]),
  k => [["path", {d: "M0 0H80A80 100 0 0 1 0 100Z"}], ["circle", {cx: 136 - k % 16, cy: 76, r: 20 + k % 14}]],
  k => [0, 1, 2].flatMap(y => [0, 1, 2, 3, 4].map(x => ["circle", {cx: 16 + x * 32, cy: 17 + y * 33, r: 4 + (k >> (x + y)) % 8}])),
  k => [["path", {d: `M160 0V100H${62 + k % 30}Z`}], ["circle", {cx: 26, cy: 18 + k % 20, r: 24}]],
];
function initials(text) {
  const words = String(text).split(",")[0].match(/\p{L}[\p{L}\p{N}]*/gu) ?? String(text).match(/[\p{L}\p{N}]+/gu) ?? ["•"];
  return words[1] ? (words[0][0] + words[1][0]).toUpperCase() : words[0][0].toUpperCase() + (words[0][1] ?? "").toLowerCase();
}
function tile(item) {
  const category = categoryOf(item), k = hash(item.item_id);
  const shapes = SHAPES[hash(category + "shape" + k % 3) % SHAPES.length](k % 97);
  const picture = vector("svg", {viewBox: "0 0 160 100", preserveAspectRatio: "xMidYMid slice"}, ...shapes.map(([tag, attributes]) => vector(tag, attributes)));
  return h("span", {class: `tile tone-${hash(category || keyOf(item.item_id)) % 12}`, "aria-hidden": "true"}, picture, h("span", {}, initials(nameOf(item))));
}

// ---------------------------------------------------------------------------------------------- asking the service

class Problem extends Error {
  constructor(status, detail, wait = null) { super(detail); Object.assign(this, {status, wait}); }
  get title() { return this.status === 0 ? "The service does not answer" : STATUS[this.status] ?? `The service answered ${this.status}`; }
  get isDown() { return [0, 502, 503, 504].includes(this.status); }
}

const stored = {
  get(name) { try { return JSON.parse(sessionStorage.getItem(`product_recs.${name}`), reading); } catch { return null; } },
  set(name, value) { try { sessionStorage.setItem(`product_recs.${name}`, JSON.stringify(value, writing)); } catch { /* private mode: kept for this view only */ } },
  drop(name) { try { sessionStorage.removeItem(`product_recs.${name}`); } catch { /* likewise */ } },
};
let apiKey = stored.get("key");

async function ask(path, {method = "GET", body, signal} = {}) {
  const headers = {Accept: "application/json, text/plain;q=.5"};
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer, text;
  try {
    answer = await fetch(path, {method, headers, signal, cache: "no-store", body: body === undefined ? undefined : JSON.stringify(body, writing)});
    text = await answer.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "no connection to it could be made");
  }
  const json = (answer.headers.get("content-type") ?? "").includes("json");
  let data = text;
  if (json) try { data = JSON.parse(text, reading); } catch { throw new Problem(answer.status || 500, "its answer cannot be read"); }
  if (!answer.ok) throw new Problem(answer.status, (json && data.detail) || answer.statusText || "no reason is given", Number(answer.headers.get("retry-after")) || null);
  return data;
}
const part = text => encodeURIComponent(text);
const eventKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("");

// ---------------------------------------------------------------------------------------------- state

const state = {
  who: null,            // id as text; null: a guest
  id: null,             // the same as the service writes it, a number or a text
  task: "discovery",
  basket: new Map(),    // key -> item
  hidden: new Map(),
  answer: null,         // last list
  model: null,
  n: N,                 // items asked for; null: what the service gives by itself
  sheet: [],            // items looked at, last one open
  allHistory: false,
};
const place = () => state.who === null ? "guest" : `person.${state.who}`;
function remember() { stored.set(place(), {basket: [...state.basket.values()], hidden: [...state.hidden.values()]}); }
function recall() {
  const found = stored.get(place()) ?? {};
  state.basket = new Map((found.basket ?? []).map(item => [keyOf(item.item_id), item]));
  state.hidden = new Map((found.hidden ?? []).map(item => [keyOf(item.item_id), item]));
}
const brief = item => ({item_id: item.item_id, title: item.title ?? null, category: item.category ?? item.attributes?.category ?? null});

// ---------------------------------------------------------------------------------------------- saying things

function say(text) {
  const line = h("p", {}, text);
  $("toasts").append(line);
  while ($("toasts").children.length > 2) $("toasts").firstChild.remove();
  setTimeout(() => line.remove(), 7000);
}
function fault(error, again) {
  return h("div", {class: "problem", role: "alert"}, h("p", {}, h("strong", {}, error.title), sentence(error.message)),
    again && h("div", {class: "row"}, h("button", {type: "button", class: "quiet", on: {click: again}}, "Try again")));
}
// outside an open dialog nothing is heard: what is said goes into it
function showDialog(dialog) {
  if (!dialog.open) dialog.showModal();
  dialog.append($("toasts"));
  dialog.addEventListener("close", () => document.body.append($("toasts")), {once: true});
}
const sentence = text => text ? text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".") : "";

// what every failed question has in common; true where nothing more is to be said
function failed(error) {
  if (error.name === "AbortError") return true;
  if (!(error instanceof Problem)) { console.error(error); return false; }
  if (error.status === 401) { askForKey(error.message); return true; }
  if (error.isDown) { goDown(error); return true; }
  return false;
}

// a service that is down is asked again and again, ever less often
const down = {timer: null, tries: 0, at: 0};
function goDown(error) {
  if (down.timer) return;
  $("down-title").textContent = error.title + ".";
  $("down-detail").textContent = sentence(error.message) + " This page tries again by itself.";
  $("down").hidden = false;
  wait(error.wait);
}
function wait(seconds) {
  down.at = Date.now() + 1000 * Math.min(seconds ?? 30, 2 ** Math.min(++down.tries, 4));
  clearInterval(down.timer);
  down.timer = setInterval(() => {
    const left = Math.ceil((down.at - Date.now()) / 1000);
    $("down-when").textContent = left > 0 ? `in ${left} s` : "now…";
    if (left <= 0) { clearInterval(down.timer); tryAgain(); }
  }, 250);
}
async function tryAgain() {
  try { await ask("health/ready"); } catch (error) {
    if (error.isDown) { $("down-detail").textContent = sentence(error.message) + " This page tries again by itself."; return wait(error.wait); }
  }
  clearInterval(down.timer);
  Object.assign(down, {timer: null, tries: 0});
  $("down").hidden = true;
  say("The service answers again.");
  loadAll();
}

function askForKey(detail) {
  const given = Boolean(apiKey);
  $("key-heading").textContent = given ? "The key was not accepted" : "This service asks for a key";
  openKey(sentence(detail));
}
function openKey(detail) {
  const opened = $("key").hidden;
  $("key").hidden = false;
  $("key-detail").textContent = detail;
  $("key-clear").hidden = !apiKey;
  if (opened) { $("key-input").focus(); }
}

// ---------------------------------------------------------------------------------------------- the list

let listing = null, latest = Promise.resolve();
function loadList(change = null) {
  listing?.abort();
  listing = new AbortController();
  latest = fetchList(listing.signal, change);
  return latest;
}
async function fetchList(signal, change) {
  $("recs").setAttribute("aria-busy", "true");
  if (!state.answer) skeletons();
  const started = performance.now();
  try {
    const answer = state.who === null ? await askForGuest(signal) : await ask(`recommend/${part(state.who)}?${state.n ? `n=${state.n}&` : ""}detail=true&task=${state.task}`, {signal});
    if (signal.aborted) return;
    if (state.who !== null) state.id = answer.user_id;
    showList(answer, performance.now() - started, change);
    if (state.model && answer.model_version !== state.model.version) loadModel();
    loadFigures();
  } catch (error) {
    if (signal.aborted) return;
    // a service may be set up to give fewer at once
    if (state.n && error.status === 422 && /^n\b/.test(error.message)) { state.n = null; return loadList(change); }
    clearList();
    if (!failed(error)) $("recs-state").replaceChildren(fault(error, () => loadList()));
    else if (error.isDown || error.status === 401) $("recs-state").replaceChildren(emptyBox("No recommendations for now", error.status === 401 ? "They need an API key." : "They come as soon as the service answers."));
  } finally {
    if (!signal.aborted) $("recs").removeAttribute("aria-busy");
  }
}
async function askForGuest(signal) {
  const events = [...state.basket.values()].map(item => ({item_id: item.item_id, event: "cart", quantity: 1}));
  const body = {task: state.task, events, detail: true};
  if (state.n) body.n = state.n;
  if (state.hidden.size) body.filters = {deny: [...state.hidden.values()].map(item => item.item_id)};
  return (await ask("recommend", {method: "POST", body, signal})).results[0];
}
function skeletons() {
  $("recs-state").replaceChildren();
  $("rung").hidden = true;
  $("list").replaceChildren(...Array.from({length: 6}, () => h("li", {class: "skeleton", "aria-hidden": "true"})));
}
function clearList() { state.answer = null; $("list").replaceChildren(); $("rung").hidden = true; }
const emptyBox = (title, text) => h("div", {class: "big-empty"}, h("strong", {}, title), text);

function showList(answer, milliseconds, change) {
  const before = state.answer && change ? new Set(state.answer.items.map(item => keyOf(item.item_id))) : null;
  state.answer = answer;
  hint(answer);
  showRung(answer, milliseconds);
  const fresh = before ? answer.items.filter(item => !before.has(keyOf(item.item_id))) : [];
  state.fresh = new Set(fresh.map(item => keyOf(item.item_id)));
  showCards(answer.items, state.fresh);
  const states = [];
  if (!answer.items.length) states.push(emptyBox("Nothing to recommend", answer.shortfall ? sentence(answer.shortfall) : "No item is left."));
  else if (answer.shortfall) states.push(h("p", {class: "notice"}, sentence(answer.shortfall)));
  $("recs-state").replaceChildren(...states);
  if (change) say(`${change} ${fresh.length ? plural(fresh.length, "new recommendation") + "." : "The recommendations stay the same."}`);
}
function showRung(answer, milliseconds) {
  const on = answer.source === "next_purchase" ? "personalised" : answer.source;
  $("ladder").replaceChildren(...RUNGS.map(([name, short]) => h("li", name === on ? {class: "on", "aria-current": "step"} : {}, name === on && answer.source === "next_purchase" ? "Next purchase" : short)));
  $("rung-words").textContent = wordsOf(answer.source);
  $("answered").textContent = `${plural(answer.items.length, "item")} in ${Math.max(1, Math.round(milliseconds))} ms${answer.model && answer.model !== answer.source ? `, by ${answer.model}` : ""}`;
  $("rung").hidden = false;
  $("lead").textContent = state.who === null && !state.basket.size ? "Nothing is known of a guest. Put something into the basket and the list follows." : state.who === null ? "Known only by what is in the basket." : $("lead").textContent;
}

function showCards(items, fresh) {
  const list = $("list"), old = new Map(), focus = focusedCard(list);
  for (const card of list.children) if (card.dataset.key) old.set(card.dataset.key, [card, card.getBoundingClientRect()]);
  list.replaceChildren(...items.map((item, at) => card(item, at + 1, fresh.has(keyOf(item.item_id)))));
  if (focus) refocus(list, focus);
  if (calm.matches || document.hidden) return;
  for (const now of list.children) {
    const [, from] = old.get(now.dataset.key) ?? [], to = now.getBoundingClientRect();
    if (from && (from.top !== to.top || from.left !== to.left))
      now.animate([{transform: `translate(${from.left - to.left}px, ${from.top - to.top}px)`}, {transform: "none"}], {duration: 420, easing: "cubic-bezier(.2,.8,.2,1)"});
    else if (!from) now.animate([{opacity: 0, transform: "scale(.96)"}, {opacity: 1, transform: "none"}], {duration: 320, easing: "ease-out"});
  }
}
// the focus stays where it was: on the same item, else on the one that took its place
function focusedCard(list) {
  const card = document.activeElement?.closest?.("li");
  if (!card || card.parentElement !== list) return null;
  return {key: card.dataset.key, at: [...list.children].indexOf(card), act: document.activeElement.dataset.act};
}
function refocus(list, {key, at, act}) {
  const card = [...list.children].find(card => card.dataset.key === key) ?? list.children[Math.min(at, list.children.length - 1)];
  (card?.querySelector(`[data-act="${act}"]`) ?? $("recs-heading")).focus({preventScroll: true});
}

function card(item, rank, isFresh) {
  const inside = state.basket.has(keyOf(item.item_id)), name = nameOf(item);
  return h("li", {"data-key": keyOf(item.item_id)},
    tile(item),
    h("span", {class: "rank", "aria-hidden": "true"}, String(rank)),
    isFresh && h("span", {class: "fresh"}, "New"),
    h("div", {class: "what"},
      h("h3", {}, h("button", {type: "button", class: "open", "data-act": "open", "aria-haspopup": "dialog", on: {click: () => openSheet(item)}}, name)),
      categoryOf(item) && h("p", {class: "category"}, categoryOf(item)),
      item.rules?.length > 0 && h("p", {class: "ruled"}, item.rules.join(", ")),
      reason(item)),
    h("div", {class: "acts"},
      inside
        ? h("button", {type: "button", class: "add", "data-act": "add", "aria-label": `Remove from basket: ${name}`, on: {click: () => remove(item)}}, "Remove from basket")
        : h("button", {type: "button", class: "add", "data-act": "add", "aria-label": `Add to basket: ${name}`, on: {click: () => add(item)}}, "Add to basket"),
      h("button", {type: "button", class: "icon", "data-act": "deny", "aria-label": `Not interested: ${name}`, title: "Not interested", on: {click: () => deny(item)}}, cross())));
}
const cross = () => vector("svg", {viewBox: "0 0 24 24", "aria-hidden": "true"}, vector("path", {d: "M6 6l12 12M18 6L6 18"}));

function reason(item) {
  const because = (item.reasons ?? []).filter(one => one.contribution === undefined || one.contribution === null || one.contribution > 0);
  const own = because.find(one => keyOf(one.item_id) === keyOf(item.item_id));
  if (state.answer?.source === "next_purchase") {
    const had = state.history?.history.find(one => keyOf(one.item_id) === keyOf(item.item_id));
    if (own?.habit) return h("p", {class: "reason"}, `You had it ${own.habit}`);
    if (own || had) return h("p", {class: "reason"}, "You had it before", had?.interactions > 1 && `, ${number.format(Math.round(had.interactions))} times`);
  }
  const [first, second] = because.filter(one => one !== own);
  if (first) return h("p", {class: "reason"}, "Because you had ", h("b", {}, nameOf(first)), second && [" and ", h("b", {}, nameOf(second))].flat());
  if (own) return h("p", {class: "reason"}, "You had it before");
  const words = {popular: "Popular with everybody", segment: "Popular with people like you", content: "Of the same kind"}[state.answer?.source];
  return words ? h("p", {class: "reason"}, words) : null;
}

// ---------------------------------------------------------------------------------------------- feedback

let saving = Promise.resolve();
// one after the other, so that an undo cannot overtake what it undoes
function tell(event, item) {
  const who = state.who;
  if (who === null) return Promise.resolve();
  const key = eventKey();
  saving = saving.catch(() => {}).then(async () => {
    if (state.id === null) await latest;
    if (state.id === null || state.who !== who) throw new Problem(409, "the person changed before it was saved");
    const answer = await ask("events", {method: "POST", body: {events: [{user_id: state.id, item_id: item.item_id, event, quantity: 1, key}]}});
    const refused = answer.results?.find(result => result.status === "rejected");
    if (refused) throw new Problem(422, refused.error);
  });
  return saving;
}
async function change(does, undoes, sends, words) {
  const who = place();
  does(); remember(); showBasket();
  try { for (const [event, item] of sends) await tell(event, item); } catch (error) {
    if (who === place()) { undoes(); remember(); showBasket(); }
    if (error.status === 401) askForKey(error.message);
    say(`Not saved. ${error.title ?? "Error"}: ${sentence(error.message)}`);
    return;
  }
  if (who !== place()) return;
  await loadList(words);
  if (state.who !== null) loadHistory();
}
function add(item) {
  const key = keyOf(item.item_id), was = state.hidden.get(key);
  return change(() => { state.hidden.delete(key); state.basket.set(key, brief(item)); },
    () => { state.basket.delete(key); if (was) state.hidden.set(key, was); },
    [...(was ? [["undeny", item]] : []), ["cart", item]], `${nameOf(item)} is in the basket.`);
}
// a known person's event is kept for good: what takes it back is "not interested"
function remove(item) {
  if (state.who !== null) return deny(item, `${nameOf(item)} is out of the basket and marked as not interesting.`);
  const key = keyOf(item.item_id), was = state.basket.get(key);
  return change(() => state.basket.delete(key), () => state.basket.set(key, was), [], `${nameOf(item)} is out of the basket.`);
}
function deny(item, words = `${nameOf(item)} will not come again.`) {
  const key = keyOf(item.item_id), was = state.basket.get(key);
  return change(() => { state.basket.delete(key); state.hidden.set(key, brief(item)); },
    () => { state.hidden.delete(key); if (was) state.basket.set(key, was); }, [["deny", item]], words);
}
function undeny(item) {
  const key = keyOf(item.item_id);
  return change(() => state.hidden.delete(key), () => state.hidden.set(key, brief(item)), [["undeny", item]], `${nameOf(item)} may come again.`);
}

// lines of a side list; the focus moves to the next line, or to the heading, where its line is gone
function line(item, detail, ...buttons) {
  return h("li", {"data-key": keyOf(item.item_id)}, tile(item),
    h("div", {class: "text"}, h("button", {type: "button", class: "open", "data-act": "open", "aria-haspopup": "dialog", on: {click: () => openSheet(item)}}, nameOf(item)), detail && h("span", {class: "category"}, detail)),
    ...buttons);
}
function fill(list, lines, heading) {
  const focus = focusedCard(list);
  list.replaceChildren(...lines);
  if (focus) lines.length ? refocus(list, focus) : heading.focus({preventScroll: true});
}
const small = (text, label, click) => h("button", {type: "button", class: "quiet small", "data-act": "do", "aria-label": label, on: {click}}, text);

function showBasket() {
  const items = [...state.basket.values()].reverse(), hidden = [...state.hidden.values()].reverse();
  fill($("basket-list"), items.map(item => line(item, categoryOf(item), small("Remove", `Remove from basket: ${nameOf(item)}`, () => remove(item)))), $("basket-heading"));
  fill($("hidden-list"), hidden.map(item => line(item, categoryOf(item), small("Undo", `Undo not interested: ${nameOf(item)}`, () => undeny(item)))), $("basket-heading"));
  $("basket-count").textContent = items.length ? plural(items.length, "item") : "";
  $("basket-empty").hidden = items.length > 0;
  $("hidden-block").hidden = hidden.length === 0;
  $("dock").hidden = false;
  $("dock").textContent = items.length ? `Basket · ${items.length}` : "Basket";
  showFound();
}

// ---------------------------------------------------------------------------------------------- search

const search = {timer: null, abort: null, items: null, error: null, query: "", hintOf: null};
// a word that this shop's items have, once for each model; where there are no titles, nothing is promised
function hint(answer) {
  if (search.hintOf === answer.model_version) return;
  const [word] = answer.items.map(item => /(?:^|\s)(\p{L}[\p{L}\p{N}]{2,})(?=\s|$)/u.exec(item.title ?? "")?.[1]).filter(Boolean);
  $("search").placeholder = word ? `for example ${word.toLowerCase()}` : "";
  if (word) search.hintOf = answer.model_version;
}
function lookFor(query) {
  clearTimeout(search.timer);
  search.abort?.abort();
  search.query = query.trim();
  if (!search.query) { search.items = search.error = null; return showFound(); }
  search.timer = setTimeout(async () => {
    search.abort = new AbortController();
    try {
      const {items} = await ask(`items?query=${part(search.query)}&limit=8`, {signal: search.abort.signal});
      Object.assign(search, {items, error: null});
    } catch (error) {
      if (error.name === "AbortError") return;
      Object.assign(search, {items: null, error: failed(error) ? null : error});
    }
    showFound();
  }, 200);
}
function showFound() {
  const box = $("found");
  if (search.error) return box.replaceChildren(h("p", {}, `${search.error.title}. ${sentence(search.error.message)}`));
  if (!search.items) return box.replaceChildren();
  if (!search.items.length) return box.replaceChildren(h("p", {}, `No item has “${search.query}” in its name.`));
  const focus = box.contains(document.activeElement) ? focusedCard(box.querySelector("ul")) : null;
  const list = h("ul", {class: "lines", "aria-label": "Items found"}, search.items.map(item => line(item, categoryOf(item),
    state.basket.has(keyOf(item.item_id)) ? h("span", {class: "badge"}, "In basket") : small("Add", `Add to basket: ${nameOf(item)}`, () => add(item)))));
  box.replaceChildren(h("p", {class: "hide"}, plural(search.items.length, "item") + " found"), list);
  if (focus) refocus(list, {...focus, act: list.children[focus.at]?.querySelector("[data-act=do]") ? focus.act : "open"});
}

// ---------------------------------------------------------------------------------------------- history

let remembering = null;
async function loadHistory() {
  remembering?.abort();
  if (state.who === null) return showHistory(null);
  remembering = new AbortController();
  const {signal} = remembering;
  if (!state.history) $("history-state").replaceChildren(h("p", {class: "empty waiting"}, "Loading…"));
  try {
    const answer = await ask(`users/${part(state.who)}/history?limit=50`, {signal});
    if (signal.aborted) return;
    showHistory(answer);
    if (state.answer?.source === "next_purchase") showCards(state.answer.items, state.fresh); // their reasons stand in the history
  } catch (error) {
    if (signal.aborted) return;
    showHistory(null);
    $("history-state").replaceChildren(...(failed(error) ? [h("p", {class: "empty"}, "Not known for now.")] : [fault(error, loadHistory)]));
  }
}
function showHistory(answer) {
  state.history = answer;
  const all = answer?.history ?? [], shown = state.allHistory ? all : all.slice(0, 6);
  $("history-state").replaceChildren(...(all.length ? [] : [h("p", {class: "empty"}, state.who === null ? "A guest has none." : "Nothing is known of this person. What goes into the basket is remembered.")]));
  fill($("history-list"), shown.map(item => line(item, historyWords(item))), $("history-heading"));
  $("history-count").textContent = all.length ? (all.length >= 50 ? "last 50" : plural(all.length, "item")) : "";
  $("history-foot").hidden = state.who === null;
  $("history-more").hidden = all.length <= 6;
  $("history-more").textContent = state.allHistory ? "Show fewer" : `Show all ${all.length}`;
  $("history-more").setAttribute("aria-expanded", String(state.allHistory));
  if (state.who !== null && answer) $("lead").textContent = answer.forgotten && !all.length ? "Forgotten: nothing of this person is used." : answer.known && all.length ? `Has ${all.length >= 50 ? "50 or more items" : plural(all.length, "item")} in the history${lastTime(all)}.` : all.length ? "New to the model, known by this feedback alone." : "The model does not know this person, so it shows what is popular.";
}
function lastTime(all) {
  const date = moment(all[0]?.last);
  return date ? `, the last ${ago(date) === dayOf(date) ? "on " + dayOf(date) : ago(date)}` : "";
}
function historyWords(item) {
  const date = moment(item.last), words = [];
  if (item.interactions > 1) words.push(`${number.format(Math.round(item.interactions))} times`);
  if (date) words.push(ago(date));
  if (categoryOf(item)) words.push(categoryOf(item));
  const text = words.join(" · ");
  return item.origin === "feedback" ? h("span", {}, h("span", {class: "badge"}, item.event ? item.event[0].toUpperCase() + item.event.slice(1) : "New"), text) : text;
}

// ---------------------------------------------------------------------------------------------- one item

function openSheet(item) {
  state.sheet = [item];
  showSheet();
  showDialog($("sheet"));
  $("sheet-title")?.focus();
}
function closeSheet() { $("sheet").close(); }
function showSheet() {
  const item = state.sheet.at(-1), body = $("sheet-body"), waiting = text => h("p", {class: "muted waiting"}, text);
  $("sheet-back").hidden = state.sheet.length < 2;
  const facts = h("section", {"aria-label": "Facts"}), why = h("section", {"aria-labelledby": "why-title"}, h("h3", {id: "why-title"}, "Why, or why not"), waiting("Asking…"));
  const alike = h("section", {"aria-labelledby": "alike-title"}, h("h3", {id: "alike-title"}, "Similar items"), waiting("Asking…"));
  const acts = h("div", {class: "row"});
  body.replaceChildren(
    h("div", {class: "sheet-head"}, tile(item), h("div", {}, h("h2", {id: "sheet-title", tabindex: "-1"}, nameOf(item)), h("p", {class: "category"}, categoryOf(item)))),
    acts, why, alike, facts);
  const renew = () => sheetActs(acts, item, renew);
  renew();
  explain(item, why);
  similar(item, alike);
  describe(item, facts);
  $("sheet").scrollTop = 0;
}
function sheetActs(acts, item, renew) {
  const key = keyOf(item.item_id), focused = acts.contains(document.activeElement);
  const does = (act, again) => async () => { await act(item); if (state.sheet.at(-1) === item) { renew(); again?.(); } };
  const redo = () => { const section = $("why-title")?.parentElement; if (section) explain(item, section); };
  acts.replaceChildren(
    state.basket.has(key) ? h("button", {type: "button", class: "quiet", on: {click: does(remove, redo)}}, "Remove from basket") : h("button", {type: "button", class: "primary", on: {click: does(add, redo)}}, "Add to basket"),
    state.hidden.has(key) ? h("button", {type: "button", class: "quiet", on: {click: does(undeny, redo)}}, "Undo “not interested”") : h("button", {type: "button", class: "quiet", on: {click: does(deny, redo)}}, "Not interested"));
  if (focused) acts.firstChild.focus();
}
function body(section, ...children) { section.replaceChildren(section.firstElementChild, ...children.filter(Boolean)); }

async function explain(item, section) {
  if (state.who === null) return explainToGuest(item, section);
  try {
    const found = await ask(`explain/${part(state.who)}/${part(item.item_id)}?task=${state.task}`);
    const signals = signalRows(found.signals);
    const common = said(found.in_common);
    body(section, verdict(found), listed([...learning(found), ...(found.rules ?? [])]), common.length > 0 && h("p", {class: "small"}, common.map(sentence).join(" ")),
      h("p", {class: "muted small"}, wordsOf(found.source)),
      found.habit && h("p", {class: "small"}, `This person had it ${found.habit}.`),
      signals.length > 0 && h("div", {}, h("h4", {class: "small muted"}, "What the score is made of"), bars(signals)),
      found.why?.length > 0 && h("div", {}, h("h4", {class: "small muted"}, signals.length ? "Where the taste comes from" : "What speaks for it, from the past"), bars(whyRows(found))));
  } catch (error) { body(section, failed(error) ? h("p", {class: "muted"}, "Not known for now.") : fault(error, () => explain(item, section))); }
}
// one sentence, several or none
const said = words => [words ?? []].flat().filter(one => typeof one === "string" && one);
const listed = words => words.length > 0 && h("ul", {class: "ruled-list small"}, words.map(text => h("li", {}, sentence(text))));
// a longer list may try an item that the explanation, which is of the service's usual length, knows nothing of
function learning(found) {
  const words = said(found.explored);
  if (!words.length && state.answer?.items.find(one => keyOf(one.item_id) === keyOf(found.item_id))?.explored) words.push(LEARNING);
  return words;
}
const LEARNING = "shown to learn about it: few people have it so far";
function verdict(found) {
  const {rank, candidates, rule} = found, moved = learning(found).length || found.rules?.length, at = state.answer?.items.findIndex(one => keyOf(one.item_id) === keyOf(found.item_id)) ?? -1;
  const place = rank ? `number ${number.format(rank)}${candidates ? ` of ${number.format(candidates)}` : ""}` : null;
  if (rule) return h("p", {class: "verdict no"}, h("strong", {}, "Left out: "), `${RULES[rule] ?? rule}.${place ? ` By its score alone it is ${place}.` : ""}`);
  if (at >= 0) return h("p", {class: "verdict"}, h("strong", {}, "Recommended: "), `number ${at + 1} of this list.${place && rank !== at + 1 ? ` By its score alone it is ${place}${moved ? "" : "; what is before it is left out"}.` : ""}`);
  return h("p", {class: "verdict no"}, h("strong", {}, "Not in the list. "), place ? `By its score it is ${place}; the list shows the best ${N} that may be shown.` : "Its score is not known.");
}
function whyRows(found) {
  const shown = found.why.slice(0, 6), known = shown.find(one => one.share);
  const other = found.why.slice(6).reduce((sum, one) => sum + one.contribution, found.other ?? 0);
  const whole = known ? known.contribution / known.share : shown.reduce((sum, one) => sum + one.contribution, other);
  return [...shown.map(one => [nameOf(one), one.contribution]), ...(Math.abs(other) > 1e-9 ? [["Everything else", other]] : [])]
    .map(([name, value]) => [name, value, whole ? percent.format(value / whole) : value.toFixed(3)]);
}
function signalRows(signals) {
  // what all items have in common explains none of them
  return Object.entries(signals ?? {}).filter(([name]) => name !== "intercept").map(([name, value]) => [SIGNALS[name] ?? tidy(name.replaceAll("_", " ")), typeof value === "number" ? value : value?.contribution])
    .filter(([, value]) => typeof value === "number" && Math.abs(value) > 1e-4).map(([name, value]) => [name, value, (value > 0 ? "+" : "−") + Math.abs(value).toFixed(2)]).sort((a, b) => b[1] - a[1]);
}
function explainToGuest(item, section) {
  const at = state.answer?.items.findIndex(one => keyOf(one.item_id) === keyOf(item.item_id)) ?? -1, inside = state.basket.has(keyOf(item.item_id));
  if (at < 0) return body(section, h("p", {class: "verdict no"}, inside ? "Left out: it is in the basket already." : state.hidden.has(keyOf(item.item_id)) ? "Left out: it is marked as not interesting." : `Not among the best ${N} for this guest.`));
  const {reasons = [], rules = [], explored} = state.answer.items[at];
  body(section, h("p", {class: "verdict"}, h("strong", {}, "Recommended: "), `number ${at + 1} of this list.`),
    listed([...(explored ? [LEARNING] : []), ...rules.map(name => `placed by the rule “${name}”`)]), h("p", {class: "muted small"}, wordsOf(state.answer.source)),
    reasons.length > 0 && bars(reasons.map(one => [nameOf(one), one.contribution, one.contribution?.toFixed(3) ?? ""])));
}
// rows: name, value, text
function bars(rows) {
  const most = Math.max(...rows.map(([, value]) => Math.abs(value)), 1e-12);
  return h("ul", {class: "bars"}, rows.map(([name, value, text]) => {
    const fillIn = h("i", {});
    fillIn.style.setProperty("--part", `${(100 * Math.abs(value) / most).toFixed(1)}%`);
    return h("li", value < 0 ? {class: "minus"} : {}, h("span", {}, name), h("span", {class: "value"}, text), h("span", {class: "track", "aria-hidden": "true"}, fillIn));
  }));
}
async function similar(item, section) {
  try {
    const {items, shortfall} = await ask(`similar/${part(item.item_id)}?n=6&detail=true`);
    body(section, items.length ? h("ul", {class: "lines", "aria-label": "Similar items"}, items.map(one => {
      const row = line(one, categoryOf(one));
      row.querySelector(".open").replaceWith(h("button", {type: "button", class: "open", on: {click: () => { state.sheet.push(one); showSheet(); $("sheet-title").focus(); }}}, nameOf(one)));
      return row;
    })) : h("p", {class: "muted"}, sentence(shortfall ?? "none is known")));
  } catch (error) { body(section, failed(error) ? h("p", {class: "muted"}, "Not known for now.") : fault(error, () => similar(item, section))); }
}
const ATTRIBUTES = {popularity: "People who had it", first_seen: "First seen", last_seen: "Last seen"};
async function describe(item, section) {
  try {
    const found = await ask(`items/${part(item.item_id)}`);
    const rows = Object.entries(found.attributes ?? {}).filter(([, value]) => value !== null && value !== "").slice(0, 12);
    section.replaceChildren(h("h3", {}, "Facts"), h("dl", {class: "attributes"},
      [["Id", String(item.item_id)], ...rows.map(([name, value]) => [ATTRIBUTES[name] ?? tidy(name.replaceAll("_", " ").toUpperCase()), fact(value)]), ["Available", found.available === false ? "No" : "Yes"]]
        .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))));
  } catch (error) { if (!failed(error) && error.status !== 404) section.replaceChildren(fault(error, () => describe(item, section))); }
}
function fact(value) {
  if (typeof value === "string" && /^\d{4}-\d\d-\d\dT/.test(value) && moment(value)) return dayOf(moment(value));
  if (typeof value === "number") return number.format(value);
  return typeof value === "boolean" ? (value ? "Yes" : "No") : tidy(value);
}

// ---------------------------------------------------------------------------------------------- the model, and live figures

const figure = (name, value, wide) => h("div", wide ? {class: "wide"} : {}, h("dt", {}, name), h("dd", {}, value));

async function loadModel() {
  try {
    const model = state.model = await ask("model");
    const made = moment(model.created_at), {starts, ends} = model.data ?? {}, shape = model.shape ?? {};
    $("model-chip").hidden = false;
    $("model-chip").textContent = made ? `Model trained ${ago(made)}` : `Model ${model.version}`;
    $("model-body").replaceChildren(h("dl", {class: "figures"},
      figure("people", number.format(shape.users ?? 0)), figure("items", number.format(shape.items ?? 0)),
      figure("person and item pairs", number.format(shape.seen ?? 0)), figure("trained", made ? ago(made) : "unknown", true),
      ...Object.entries({"for something new": "discovery", "for the next purchase": "next_purchase"})
        .map(([what, task]) => model.models?.[task]?.name && figure(what, model.models[task].name, true)),
      moment(starts) && figure("learned from", `${dayOf(moment(starts))} to ${dayOf(moment(ends))}`, true),
      figure("version", model.version, true)),
      ...modelNotes(model));
  } catch (error) {
    if (!failed(error)) $("model-body").replaceChildren(fault(error, loadModel));
    else if (!state.model) $("model-body").replaceChildren(h("p", {class: "empty"}, "Not known for now."));
  }
}
function modelNotes(model) {
  const notes = [], quality = model.metrics?.evaluation ?? {};
  const next = quality["next_purchase_hit_rate@10"], found = quality["discovery_hit_rate@10"];
  if (typeof next === "number" && typeof found === "number")
    notes.push(`Tested on the weeks after ${quality.split ? dayOf(moment(quality.split)) : "its training"}: of ten next purchases proposed, at least one was bought by ${percent.format(next)} of the people; of ten new items, by ${percent.format(found)}.`);
  else if (typeof found === "number" && quality.judged?.note)
    notes.push(`Of ten new items proposed, at least one was right for ${percent.format(found)} of the people. ${quality.judged.note}`);
  if (model.data?.run === "complete_journey") notes.push("Sample data: grocery purchases with dates shifted to 2017, described as simulated. Good for looking, not for business conclusions.");
  const refused = model.refused && (Array.isArray(model.refused) ? model.refused.at(-1) : model.refused);
  if (refused) notes.push(`A newer model${refused.version ? `, ${refused.version},` : ""} was refused: ${sentence(String(refused.error ?? refused))}`);
  return notes.map(text => h("p", {class: "note"}, text));
}

function samples(text) {
  const found = [];
  for (const row of text.split("\n")) {
    const [, name, inner, value] = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/.exec(row) ?? [];
    if (name) found.push({name, labels: Object.fromEntries([...(inner ?? "").matchAll(/(\w+)="((?:\\.|[^"\\])*)"/g)].map(([, label, text]) => [label, text.replace(/\\(.)/g, "$1")])), value: Number(value.replace("Inf", "Infinity"))});
  }
  return found;
}
// the value below which a share of the observations lies, as Prometheus computes it
function quantile(share, buckets) {
  const sums = new Map();
  for (const {labels, value} of buckets) sums.set(labels.le, (sums.get(labels.le) ?? 0) + value);
  const steps = [...sums].map(([le, count]) => [le === "+Inf" ? Infinity : Number(le), count]).sort((a, b) => a[0] - b[0]);
  const total = steps.at(-1)?.[1] ?? 0, wanted = share * total;
  if (!total) return null;
  let [low, below] = [0, 0];
  for (const [le, count] of steps) {
    if (count >= wanted) return {seconds: le === Infinity ? low : low + (le - low) * (wanted - below) / Math.max(count - below, 1e-12), beyond: le === Infinity};
    [low, below] = [le, count];
  }
  return null;
}
const ofAnswers = ({labels}) => /^\/(recommend|similar|popular|explain)/.test(labels.route ?? labels.path ?? "");

async function loadFigures() {
  try {
    const all = samples(await ask("metrics")), named = name => all.filter(sample => sample.name === `product_recs_${name}`);
    const requests = named("http_requests_total"), total = rows => rows.reduce((sum, {value}) => sum + value, 0);
    const buckets = named("http_request_duration_seconds_bucket").filter(ofAnswers);
    const show = q => q ? (q.beyond ? "over " : "") + duration(q.seconds) : "–";
    const faults = total(requests.filter(({labels}) => /^5/.test(labels.status ?? labels.code ?? "")));
    $("live-body").replaceChildren(
      h("dl", {class: "figures"},
        figure("answers given", number.format(total(requests.filter(ofAnswers)))), figure("faults", number.format(faults)),
        figure("half are faster than", show(quantile(.5, buckets))), figure("95 of 100 are faster than", show(quantile(.95, buckets)))),
      h("p", {class: "note"}, "Since the service started, measured inside it: recommendations, similar items and explanations."));
    showRungs(named("recommendations_total"));
  } catch (error) {
    if (error.status === 404) error = new Problem(404, "this service offers no figures");
    const words = failed(error) ? "Not known for now." : `${error.title}. ${sentence(error.message)}`;
    $("live-body").replaceChildren(h("p", {class: "empty"}, words));
    $("rungs-body").replaceChildren();
  }
}
// what the job `monitor` found last; the card is there once it has run
const LEVELS = ["stop", "look", "fine"], LEVEL_SIGNS = {stop: "✗", look: "?", fine: "✓"};
async function loadChecks() {
  let groups = {};
  try { ({groups} = await ask("monitor")); } catch (error) { if (failed(error)) return; }
  const parts = Object.entries(groups ?? {}), all = parts.flatMap(([, {checks}]) => checks);
  $("checks").hidden = !parts.length;
  if (!parts.length) return;
  const needy = LEVELS.slice(0, 2).flatMap(level => all.filter(check => check.level === level));
  $("checks-count").textContent = needy.length ? `${number.format(needy.length)} of ${number.format(all.length)} need somebody` : `All ${number.format(all.length)} are fine`;
  $("checks-body").replaceChildren(
    h("ul", {class: "verdicts"}, needy.map(({name, level, says, remedy}) => h("li", {class: level},
      h("strong", {}, `${LEVEL_SIGNS[level]} ${tidy(name)}: `), tidy(says), remedy && h("p", {class: "muted small"}, tidy(remedy))))),
    h("p", {class: "note"}, `Judged: ${parts.map(([group, {at}]) => `${group} ${ago(moment(at))}`).join(", ")}.`));
}

function showRungs(rows) {
  const counts = new Map();
  for (const {labels, value} of rows) counts.set(labels.source ?? "?", (counts.get(labels.source ?? "?") ?? 0) + value);
  const sum = [...counts.values()].reduce((a, b) => a + b, 0), order = [...counts].filter(([, value]) => value > 0).sort((a, b) => b[1] - a[1]);
  $("rungs-body").replaceChildren(order.length ? bars(order.map(([name, value]) => [RUNG_NAMES[name] ?? name, value, `${number.format(value)} · ${percent.format(value / sum)}`])) : h("p", {class: "empty"}, "No recommendation was asked for yet."));
}
setInterval(() => { if (!document.hidden && $("live").checked && !down.timer && $("key").hidden) loadFigures(); }, EVERY);

// ---------------------------------------------------------------------------------------------- the rules of the shop

const shop = {state: null, saved: "", timer: null, abort: null};
const SAMPLES = {
  Pin: {name: "on top", pin: 1, items: [101]}, Boost: {name: "summer sale", boost: 1.5, where: {category: ["tea"]}, from: "2026-06-01", until: "2026-08-31"},
  Bury: {name: "clearance", bury: 1, items: [101]}, Exclude: {name: "not here", exclude: true, items: [101], places: ["mail"]},
};
// a list of ids or words stands on one line
const asText = document => JSON.stringify(document ?? {rules: []}, writing, 2).replace(/\[\n\s+([^[\]{}]*?)\n\s+\]/g, (_, inner) => `[${inner.replace(/\n\s+/g, " ")}]`);
const some = list => list.slice(0, 4).map(String).join(", ") + (list.length > 4 ? ` and ${number.format(list.length - 4)} more` : "");
function wanted(conditions) {
  return Object.entries(conditions).map(([name, value]) => {
    if (Array.isArray(value)) return `${name} ${some(value)}`;
    return `${name} ${"min" in value ? `from ${value.min}` : ""}${"min" in value && "max" in value ? " " : ""}${"max" in value ? `up to ${value.max}` : ""}`;
  }).join("; ");
}
// a rule as a sentence: what it does, to what, and when it holds
function ruleWords(rule) {
  const act = "pin" in rule ? `Place ${some([rule.pin].flat())}` : "boost" in rule ? `Up by ${rule.boost} σ` : "bury" in rule ? `Down by ${rule.bury} σ` : "Never shown";
  const what = [rule.items && `${rule.items.length === 1 ? "item" : "items"} ${some(rule.items)}`, rule.where && wanted(rule.where)].filter(Boolean).join(", with ");
  const when = [rule.users && `for people with ${wanted(rule.users)}`, rule.places && `at ${some(rule.places)}`, rule.tasks && `for ${some(rule.tasks).replaceAll("_", " ")}`,
    rule.from && `from ${rule.from}`, rule.until && `until ${rule.until}`].filter(Boolean).join(" · ");
  return [`${act}: ${what}`, when];
}
const KINDS = {pin: "Pin", boost: "Boost", bury: "Bury", exclude: "Exclude"};

async function loadRules() {
  try { showRules(await ask("rules")); } catch (error) {
    if (error.status === 404) { $("shop").hidden = true; return; }
    if (!failed(error)) $("rules-state").replaceChildren(fault(error, loadRules));
    else if (!shop.state) $("rules-state").replaceChildren(h("p", {class: "empty"}, "Not known for now."));
  }
}
function showRules(found) {
  const edited = shop.state && $("rules-text").value !== shop.saved; // what somebody is writing stays
  shop.state = found;
  shop.saved = asText(found.document);
  if (!edited) $("rules-text").value = shop.saved;
  const rules = found.document?.rules ?? [], active = found.rules.filter(rule => rule.active).length;
  $("shop-source").textContent = {database: "Saved here", file: "From the rules file", none: ""}[found.source];
  $("rules-count").textContent = rules.length ? (active === rules.length ? plural(active, "rule") : `${active} of ${plural(rules.length, "rule")}`) : "";
  $("rules-delete").hidden = found.source !== "database";
  $("rules-list").replaceChildren(...rules.map((rule, at) => {
    const state = found.rules[at], [what, when] = ruleWords(rule);
    return h("li", state.active ? {} : {class: "asleep"}, h("span", {class: `kind ${state.action}`}, KINDS[state.action]),
      h("div", {class: "text"}, h("strong", {}, rule.name), h("span", {}, what), when && h("span", {class: "category"}, when),
        !state.active && h("span", {class: "category"}, sentence(`not now: ${state.why}`))));
  }));
  $("rules-state").replaceChildren(
    ...(found.error ? [h("div", {class: "problem", role: "alert"}, h("p", {}, h("strong", {}, "A newer version is not in force"), sentence(found.error)))] : []),
    ...(rules.length ? [] : [h("p", {class: "empty"}, "None. Lists are as the model makes them.")]),
    ...(found.overruled ? [h("p", {class: "muted small"}, `These beat the rules file ${found.overruled}.`)] : []),
    ...(found.warnings.length ? [h("div", {class: "notice small"}, h("strong", {}, "This model does not have all of it"), h("ul", {}, found.warnings.map(text => h("li", {}, sentence(text)))))] : []));
  judge();
}
function verdictOn(text, bad = false) {
  $("rules-verdict").textContent = text;
  $("rules-verdict").classList.toggle("bad", bad);
  $("rules-text").setAttribute("aria-invalid", String(bad));
  $("preview").classList.toggle("stale", bad);
}
function typed() {
  try { return JSON.parse($("rules-text").value, reading); } catch (error) {
    verdictOn(`Not readable as JSON: ${error.message}`, true);
    return null;
  }
}
function judge() {
  const changed = $("rules-text").value !== shop.saved;
  $("rules-save").disabled = $("rules-reset").disabled = !changed;
  clearTimeout(shop.timer);
  shop.timer = setTimeout(showPreview, 350);
}
async function showPreview() {
  const document = typed();
  $("preview-who").textContent = state.who === null ? "a guest" : `person ${state.who}`;
  if (!document) return;
  shop.abort?.abort();
  shop.abort = new AbortController();
  const {signal} = shop.abort, day = $("preview-day").value, spot = $("preview-place").value.trim();
  const body = {document, task: state.task, n: Math.min(10, state.n ?? 10)};
  if (state.who !== null) body.users = [state.id ?? state.who];
  else {
    body.events = [...state.basket.values()].map(item => ({item_id: item.item_id, event: "cart", quantity: 1}));
    if (state.hidden.size) body.filters = {deny: [...state.hidden.values()].map(item => item.item_id)};
  }
  if (spot) body.place = spot;
  if (day) body.at = `${day}T12:00:00Z`;
  try {
    const found = await ask("rules/preview", {method: "POST", body, signal});
    if (signal.aborted) return;
    showSides(found);
    verdictOn($("rules-text").value === shop.saved ? "" : "These rules are sound. They are not saved yet.");
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") return;
    if (error.status === 422) return verdictOn(sentence(error.message), true);
    $("preview-sides").hidden = true;
    $("preview-state").replaceChildren(failed(error) ? h("p", {class: "empty"}, "No preview for now.") : fault(error, showPreview));
  }
}
function showSides(found) {
  const moves = one => one.other_rank === null ? null : one.other_rank - one.rank;
  const line = (one, badge) => h("li", badge[0] ? {class: badge[0]} : {}, h("span", {class: "num"}, String(one.rank)),
    h("div", {class: "text"}, h("span", {class: "name"}, one.title || `Item ${one.item_id}`), one.rules.length > 0 && h("span", {class: "category"}, one.rules.join(", ")),
      one.gone && h("span", {class: "category"}, sentence(one.gone))), badge[1] && h("span", {class: "move"}, badge[1]));
  const badge = one => { const by = moves(one); return [one.rules.length ? "by-rule" : "", by === null ? "new" : by > 0 ? `↑ ${by}` : by < 0 ? `↓ ${-by}` : null]; };
  $("preview-sides").hidden = false;
  $("preview-before").replaceChildren(...found.before.map(one => line(one, one.other_rank === null ? ["gone", "out"] : ["", null])));
  $("preview-after").replaceChildren(...found.after.map(one => line(one, badge(one))));
  const asleep = found.rules.filter(rule => !rule.active);
  $("preview-state").replaceChildren(
    ...(found.undone.length ? [h("div", {class: "notice small"}, h("strong", {}, "What could not be done"), h("ul", {}, found.undone.map(text => h("li", {}, sentence(text)))))] : []),
    ...(asleep.length ? [h("p", {class: "muted small"}, asleep.map(rule => `“${rule.name}” does nothing here: ${rule.why}.`).join(" "))] : []),
    ...(found.after.length ? [] : [h("p", {class: "empty"}, found.shortfall ? sentence(found.shortfall) : "Nothing to show.")]));
}
async function saveRules() {
  const document = typed();
  if (!document) return $("rules-text").focus();
  $("rules-save").disabled = true;
  try {
    const found = await ask("rules", {method: "PUT", body: document});
    $("rules-text").value = asText(found.document);
    shop.saved = $("rules-text").value;
    showRules(found);
    say("The rules are saved. They hold for all customers.");
    loadList();
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    verdictOn(`Not saved. ${error.status === 422 ? "" : `${error.title ?? "Error"}: `}${sentence(error.message)}`, true);
    $("rules-save").disabled = false;
  }
}
async function deleteRules() {
  try {
    const found = await ask("rules", {method: "DELETE"});
    shop.saved = null; // the text stays, to be saved again
    showRules(found);
    say(`Taken away. ${found.source === "file" ? "The rules file counts again." : "There are no rules."} The text stays in the editor.`);
    loadList();
  } catch (error) { if (!failed(error)) verdictOn(`Not taken away. ${error.title}: ${sentence(error.message)}`, true); }
}
function addSample(kind) {
  const document = typed();
  if (!document) return;
  const rules = [...(document.rules ?? [])], names = new Set(rules.map(rule => rule.name)), sample = structuredClone(SAMPLES[kind]);
  for (let copy = 2; names.has(sample.name); copy++) sample.name = `${SAMPLES[kind].name} ${copy}`;
  const first = state.answer?.items[state.answer.items.length - 1];
  if (sample.items && first) sample.items = [first.item_id];
  if (sample.where && first) { const category = first.category ?? first.attributes?.category; if (category) sample.where = {category: [category]}; }
  $("rules-text").value = asText({...document, rules: [...rules, sample]});
  judge();
}

// ---------------------------------------------------------------------------------------------- a new product, by hand

const ASKED = 200, DEPTH = 20, TOGETHER = 50; // people, places of their lists, people in one request
const newcomer = {fields: null, id: null, name: "", abort: null, reached: [], all: false, timer: null};
const COUNTED = new Set(["title", "popularity", "first_seen", "last_seen", "excluded"]);
const VECTOR = /^\[[\d,]+ numbers\]$/; // a column for programs

function kindOf(values) {
  const [first] = values;
  if (typeof first === "boolean") return "choice";
  if (typeof first === "number" || typeof first === "bigint") return "number";
  if (Array.isArray(first)) return "list";
  return values.every(value => /^\d{4}-\d\d-\d\dT/.test(value)) ? "day" : "text";
}
// the values that several items share, the most frequent first
function frequent(values) {
  const counts = new Map();
  for (const value of values.flat()) counts.set(value, (counts.get(value) ?? 0) + 1);
  return [...counts].filter(([, count]) => count > 1).sort((a, b) => b[1] - a[1]).slice(0, 40).map(([value]) => value);
}
async function loadFields() {
  const popular = n => ask(`popular?${n ? `n=${n}&` : ""}detail=true`);
  try {
    const {items} = await popular(state.n ? 100 : null).catch(error => { if (error.status === 422) return popular(null); throw error; });
    const columns = new Map();
    for (const {attributes} of items) for (const [name, value] of Object.entries(attributes))
      if (value !== null && value !== "" && !COUNTED.has(name)) columns.set(name, [...(columns.get(name) ?? []), value]);
    for (const [name, values] of columns) if (VECTOR.test(values[0])) columns.delete(name);
    if (!columns.size) columns.set("category", [""]);
    newcomer.fields = [...columns].slice(0, 20).map(([name, values], at) => field(name, values, at));
    $("product-fields").replaceChildren(...newcomer.fields.map(one => one.box));
  } catch (error) { if (!failed(error)) $("product-fields").replaceChildren(fault(error, loadFields)); }
}
function field(name, values, at) {
  const kind = kindOf(values), id = `product-field-${at}`, options = kind === "text" || kind === "list" ? frequent(values) : [];
  const common = {id, "aria-describedby": `${id}-note`};
  const input = kind === "choice" ? h("select", common, h("option", {value: ""}, "Not said"), h("option", {value: "yes"}, "Yes"), h("option", {value: "no"}, "No"))
    : h("input", {...common, autocomplete: "off", type: kind === "day" ? "date" : "text", inputmode: kind === "number" ? "decimal" : null, list: options.length ? `${id}-list` : null, placeholder: kind === "list" ? "several, with commas" : null});
  const box = h("div", {}, h("label", {for: id}, tidy(name.replaceAll("_", " ").toUpperCase())), input, h("p", {class: "wrong", id: `${id}-note`}),
    options.length > 0 && h("datalist", {id: `${id}-list`}, options.map(value => h("option", {value: String(value)}))));
  return {name, kind, input, box};
}
const inputs = () => [{name: "title", kind: "text", input: $("product-title")}, ...(newcomer.fields ?? [])];
function valueOf(kind, text) {
  if (kind === "choice") return text === "yes";
  if (kind === "number") return Number.isFinite(Number(text)) ? Number(text) : text; // the service says what is wrong with it
  return kind === "list" ? text.split(",").map(one => one.trim()).filter(Boolean) : text;
}
const shownValue = (kind, value) => kind === "choice" ? (value ? "yes" : "no") : kind === "day" ? String(value).slice(0, 10) : Array.isArray(value) ? value.join(", ") : String(value);

function noteAt(input, text, bad = false) {
  $(`${input.id}-note`).textContent = text;
  input.setAttribute("aria-invalid", String(bad));
}
function productSays(text, bad = false) {
  $("product-verdict").textContent = text;
  $("product-verdict").classList.toggle("bad", bad);
}
// the service names the field in quotes as Python writes them
function isAbout(error, name) {
  const text = name.replace(/[^\x20-\x7e]/gu, letter => { const code = letter.codePointAt(0); return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : code < 65536 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\U${code.toString(16).padStart(8, "0")}`; });
  return [`attributes: '${text}'`, `attributes: "${text}"`].find(start => error.startsWith(start));
}
function refuse(error) {
  const one = inputs().find(({name}) => isAbout(error, name)), input = error.startsWith("item_id") ? $("product-id") : one?.input;
  const label = input && document.querySelector(`label[for="${input.id}"]`).textContent;
  const words = input ? error.slice((one ? isAbout(error, one.name) : "item_id").length).replace(/^:?\s*/, "") : error;
  productSays(label ? `Not added: see “${label}”.` : `Not added. ${sentence(words)}`, true);
  if (!input) return;
  noteAt(input, sentence(words), true);
  input.focus();
}
function showButtons() {
  $("product-add").textContent = newcomer.id === null ? "Add" : "Change";
  $("product-delete").hidden = $("product-next").hidden = newcomer.id === null;
}
// an id that is known already: what is told of it is changed, not added
function lookUp() {
  clearTimeout(newcomer.timer);
  const typed = $("product-id").value.trim();
  newcomer.id = null;
  noteAt($("product-id"), "");
  showButtons();
  if (!typed) return;
  newcomer.timer = setTimeout(async () => {
    try {
      const {items} = await ask(`items?query=${part(typed)}&limit=1`);
      if (!items.length || String(items[0].item_id) !== typed || $("product-id").value.trim() !== typed || newcomer.id !== null) return;
      const {item_id: id, title, attributes} = await ask(`items/${part(items[0].item_id)}`);
      if ($("product-id").value.trim() !== typed) return;
      newcomer.id = id;
      noteAt($("product-id"), `Known already${title ? ` as “${title}”` : ""}. What you tell here beats that.`);
      showButtons();
      if (inputs().some(({input}) => input.value)) return;
      for (const {name, kind, input} of inputs()) { const value = name === "title" ? title : attributes[name]; if (value !== null && value !== undefined) input.value = shownValue(kind, value); }
    } catch (error) { failed(error); }
  }, 300);
}
// a worker of its own may take up what was told a moment later
async function soon(question) {
  for (let tries = 0; ; tries++) {
    try { return await question(); } catch (error) {
      if (error.status !== 404 || tries === 4) throw error;
      await new Promise(done => setTimeout(done, 500));
    }
  }
}
async function tellProduct() {
  const typed = $("product-id").value.trim(), attributes = {}, was = newcomer.id !== null;
  clearTimeout(newcomer.timer);
  for (const {input} of [{input: $("product-id")}, ...inputs()]) noteAt(input, "");
  if (!typed) return refuse("item_id: an id is needed, one that no other product has");
  for (const {name, kind, input} of inputs()) if (input.value.trim()) attributes[name] = valueOf(kind, input.value.trim());
  newcomer.abort?.abort();
  newcomer.abort = new AbortController();
  const {signal} = newcomer.abort;
  $("product-add").disabled = $("product-delete").disabled = true;
  productSays("Telling the service…");
  try {
    const answer = await ask("items", {method: "POST", body: {items: [{item_id: typed, attributes}]}}), [result] = answer.results;
    if (result.status === "rejected") return refuse(result.error);
    Object.assign(newcomer, {id: result.item_id, name: attributes.title || `Item ${result.item_id}`});
    productSays(`${newcomer.name} is ${result.status === "unchanged" ? "as it was" : was ? "changed" : "added"}.`);
    showButtons();
    showUnderstood(answer, result, signal);
    showAkin(newcomer.id, signal);
    measure(newcomer.id, signal);
    loadList();
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    productSays(`Not added. ${error.title ?? "Error"}: ${sentence(error.message)}`, true);
  } finally { $("product-add").disabled = $("product-delete").disabled = false; }
}
async function showUnderstood(answer, {item_id: id, placed, note}, signal) {
  const words = placed ? "The model scores it by its attributes, so it may come in every list." : placed === false ? "The model that answers does not score it, so it comes in no list of its own accord. The search, similar items and /new have it."
    : "The model takes it up within a second.";
  const facts = h("dl", {class: "attributes"});
  $("understood-body").replaceChildren(h("p", {class: placed ? "verdict" : "verdict no"}, h("strong", {}, placed ? "Accepted and placed. " : "Accepted. "), words), facts,
    ...(note ? [h("p", {class: "small"}, sentence(note))] : []), ...(placed ? [] : [h("p", {class: "muted small"}, sentence(answer.where))]));
  try {
    const found = await soon(() => ask(`items/${part(id)}`, {signal}));
    const rows = Object.entries(found.attributes).filter(([name, value]) => value !== null && value !== "" && !COUNTED.has(name));
    facts.replaceChildren(...[["Id", String(found.item_id)], ...(found.title ? [["Title", found.title]] : []), ...rows.map(([name, value]) => [tidy(name.replaceAll("_", " ").toUpperCase()), Array.isArray(value) ? value.join(", ") : fact(value)])]
      .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  } catch (error) { if (!signal.aborted && !failed(error)) facts.replaceWith(fault(error)); }
}
async function showAkin(id, signal) {
  $("akin").replaceChildren(h("p", {class: "muted waiting"}, "Looking for similar items…"));
  try {
    const {items, shortfall} = await soon(() => ask(`similar/${part(id)}?n=6&detail=true`, {signal}));
    if (signal.aborted) return;
    $("akin").replaceChildren(h("h4", {id: "akin-heading"}, "Similar items"), items.length ? h("ul", {class: "lines", "aria-labelledby": "akin-heading"}, items.map(one => line(one, categoryOf(one))))
      : h("p", {class: "empty"}, sentence(shortfall ?? "none is known")));
  } catch (error) { if (!signal.aborted) $("akin").replaceChildren(failed(error) ? h("p", {class: "empty"}, "Not known for now.") : fault(error, () => showAkin(id, signal))); }
}

// who of a sample of people has an item in their list, and at which place
async function listsWith(id, signal) {
  const {users, total} = await ask(`users?limit=${ASKED}`, {signal}), reached = [], key = keyOf(id);
  const asked = {task: state.task, n: DEPTH};
  $("reach-progress").max = Math.max(users.length, 1);
  for (let at = 0, size = TOGETHER; at < users.length;) {
    $("reach-progress").value = at;
    $("reach-words").textContent = `Asking for the lists of ${plural(users.length, "person", "people")}: ${number.format(at)} so far.`;
    try {
      const {results} = await ask("recommend", {method: "POST", body: {...asked, users: users.slice(at, at + size)}, signal});
      for (const {user_id: user, recommendations} of results) {
        const place = recommendations.findIndex(one => keyOf(one) === key);
        if (place >= 0) reached.push({user, place: place + 1});
      }
      at += size;
    } catch (error) { // a service may be set up to give less at once
      if (error.status === 422 && asked.n && /^n\b/.test(error.message)) delete asked.n;
      else if (error.status === 422 && size > 1 && /^users\b/.test(error.message)) size = Math.ceil(size / 5);
      else throw error;
    }
  }
  return {reached: reached.sort((a, b) => a.place - b.place), people: users.length, total, task: asked.task, n: asked.n};
}
async function measure(id, signal) {
  $("reach").hidden = false;
  $("reach-count").textContent = "";
  $("reach-body").replaceChildren();
  $("reach-wait").hidden = false;
  $("reach").setAttribute("aria-busy", "true");
  try {
    const found = await listsWith(id, signal);
    if (signal.aborted) return null;
    Object.assign(newcomer, {reached: found.reached, all: false});
    showReach(id, found, signal);
    return found;
  } catch (error) {
    if (!signal.aborted) $("reach-body").replaceChildren(failed(error) ? h("p", {class: "empty"}, "Not known for now.") : fault(error, () => measure(id, signal)));
    return null;
  } finally { if (!signal.aborted) { $("reach-wait").hidden = true; $("reach").removeAttribute("aria-busy"); } }
}
function showReach(id, {reached, people, total, task, n}, signal) {
  const list = `“${task === "discovery" ? "Something new" : "Next purchase"}”${n ? `, best ${n}` : ""}`;
  $("reach-count").textContent = `${people === total ? `All ${plural(people, "person", "people")}` : `${number.format(people)} of ${plural(total, "person", "people")}`} asked · ${list}`;
  if (!reached.length) return $("reach-body").replaceChildren(h("p", {class: "empty"}, "Nobody of them has it in their list."));
  const first = reached[0].place, middle = reached[Math.floor((reached.length - 1) / 2)].place;
  const rows = reached.map(one => reachRow(one, id, task, signal));
  const show = () => {
    table.tBodies[0].replaceChildren(...(newcomer.all ? rows : rows.slice(0, 10)).map(one => one.row));
    more.textContent = newcomer.all ? "Show fewer" : `Show all ${number.format(rows.length)}`;
    more.setAttribute("aria-expanded", String(newcomer.all));
  };
  const table = h("table", {class: "reached", "aria-labelledby": "reach-heading"}, h("thead", {}, h("tr", {}, ["Person", "Place", "What speaks for it"].map(name => h("th", {scope: "col"}, name)))), h("tbody"));
  const more = h("button", {type: "button", class: "quiet", on: {click: () => { newcomer.all = !newcomer.all; show(); }}});
  show();
  $("reach-body").replaceChildren(h("dl", {class: "figures"}, figure("have it in their list", `${number.format(reached.length)} · ${percent.format(reached.length / people)}`),
    figure("best place", number.format(first)), figure("half have it at place", `${number.format(middle)} or better`)), table, ...(rows.length > 10 ? [h("div", {class: "row"}, more)] : []));
  for (const {why} of rows.slice(0, 3)) why();
}
function reachRow({user, place}, id, task, signal) {
  const cell = h("td", {});
  const why = async () => {
    cell.replaceChildren(h("span", {class: "muted waiting"}, "Asking…"));
    try {
      const found = await ask(`explain/${part(user)}/${part(id)}?task=${task}`, {signal}), words = [...said(found.in_common), ...said(found.explored), ...(found.rules ?? [])];
      const [first, second] = (found.why ?? []).filter(one => one.contribution > 0);
      if (first) words.splice(said(found.in_common).length, 0, `they had ${nameOf(first)}${second ? ` and ${nameOf(second)}` : ""}`);
      cell.textContent = words.length ? words.map(sentence).join(" ") : "Nothing they had: it would be there for anybody.";
    } catch (error) { if (!signal.aborted) cell.replaceChildren(failed(error) ? "Not known for now." : `${error.title}: ${sentence(error.message)}`); }
  };
  cell.append(h("button", {type: "button", class: "quiet", "aria-label": `Why person ${user}`, on: {click: why}}, "Why?"));
  const row = h("tr", {}, h("td", {}, h("button", {type: "button", class: "link", "aria-label": `Show person ${user}`, on: {click: () => { go(String(user), task); toHeading("title"); }}}, String(user))), h("td", {class: "num"}, number.format(place)), cell);
  return {row, why};
}

const REMAINS = {"products file": "The products file still knows it.", interactions: "People had it, so the model still knows it, as its training did."};
async function deleteProduct() {
  const {id} = newcomer, name = newcomer.name || `Item ${id}`;
  newcomer.abort?.abort();
  newcomer.abort = new AbortController();
  const {signal} = newcomer.abort;
  $("product-add").disabled = $("product-delete").disabled = true;
  try {
    const {remains} = await ask(`items/${part(id)}`, {method: "DELETE"});
    Object.assign(newcomer, {id: null, name: ""});
    showButtons();
    noteAt($("product-id"), "");
    $("product-add").disabled = false;
    $("product-add").focus();
    productSays(`${name} is deleted. ${REMAINS[remains] ?? ""}`);
    $("akin").replaceChildren();
    $("understood-body").replaceChildren(h("p", {class: "muted waiting"}, "Looking whether it is gone…"));
    loadList();
    const found = await measure(id, signal), {items} = await ask(`items?query=${part(id)}&limit=1`, {signal});
    if (signal.aborted) return;
    const still = items.some(one => keyOf(one.item_id) === keyOf(id)), gone = found && !found.reached.length && !still;
    $("understood-body").replaceChildren(h("p", {class: "verdict no"}, ...(gone ? [h("strong", {}, "Gone. "), `The search does not find it, and none of ${plural(found.people, "person", "people")} has it in their list.`]
      : [h("strong", {}, "Deleted. "), REMAINS[remains] ?? (found ? "It is still seen: another worker forgets it within a second." : "Whether a list still has it is not known for now.")])));
    if (gone) $("reach").hidden = true;
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 401) askForKey(error.message);
    productSays(`Not deleted. ${error.title ?? "Error"}: ${sentence(error.message)}`, true);
  } finally { $("product-add").disabled = $("product-delete").disabled = false; }
}
function anotherProduct() {
  newcomer.abort?.abort();
  Object.assign(newcomer, {id: null, name: ""});
  for (const {input} of [{input: $("product-id")}, ...inputs()]) { input.value = ""; noteAt(input, ""); }
  productSays("");
  showButtons();
  $("reach").hidden = true;
  $("akin").replaceChildren();
  $("understood-body").replaceChildren(h("p", {class: "empty"}, "Nothing is added yet."));
  $("product-id").focus();
}

// ---------------------------------------------------------------------------------------------- who

async function loadPeople() {
  try {
    const {users, total} = await ask("users?limit=20");
    $("people").replaceChildren(...users.map(id => h("option", {value: String(id)})));
    $("samples").replaceChildren(...users.slice(0, 5).map(id => h("button", {type: "button", class: "chip", "data-person": String(id), on: {click: () => go(String(id))}}, String(id))));
    $("person-note").textContent = total ? `${plural(total, "person is", "people are")} known. Anybody else is answered too.` : "Nobody is known yet.";
    mark();
    return users;
  } catch (error) { failed(error); return []; }
}
function mark() {
  $("guest").setAttribute("aria-pressed", String(state.who === null));
  for (const chip of $("samples").children) chip.setAttribute("aria-pressed", String(chip.dataset.person === state.who));
}

function address() {
  const words = new URLSearchParams(location.hash.slice(1));
  return {who: words.has("user") && words.get("user") !== "" ? words.get("user") : null, guest: words.has("guest"), task: words.get("task") === "next_purchase" ? "next_purchase" : "discovery", empty: !words.has("user") && !words.has("guest")};
}
const link = (who, task) => "#" + (who === null ? "guest" : `user=${part(who)}`) + (task === "discovery" ? "" : `&task=${task}`);
function go(who, task = state.task, {replace = false} = {}) {
  const target = link(who, task);
  if (target !== location.hash) history[replace ? "replaceState" : "pushState"](null, "", target);
  follow();
}
function follow() {
  const {who, task} = address(), other = who !== state.who || !state.started;
  Object.assign(state, {who, task, started: true});
  document.querySelector(`#tasks input[value="${task}"]`).checked = true;
  if (other) {
    if ($("sheet").open) closeSheet();
    Object.assign(state, {id: null, answer: null, history: null, allHistory: false});
    recall();
    showBasket();
    $("title").textContent = who === null ? "A guest" : `Person ${who}`;
    document.title = `${$("title").textContent} · Recommendations`;
    $("person").value = who ?? "";
    $("lead").textContent = "";
    mark();
    showHistory(null);
    loadHistory();
  }
  loadList();
  if (shop.state) latest.finally(judge);
}
async function loadAll() {
  loadModel();
  loadChecks();
  loadRules();
  if (newcomer.near && !newcomer.fields) loadFields();
  const people = loadPeople();
  if (state.started) { loadHistory(); return loadList(); }
  if (!address().empty) return follow();
  // nobody is named in the address: somebody who is known shows most
  skeletons();
  const [first] = await people;
  if (!state.started) go(first === undefined ? null : String(first), address().task, {replace: true});
}

// ---------------------------------------------------------------------------------------------- forgetting

async function forget() {
  const who = state.who;
  $("ask-problem").hidden = true;
  $("ask-yes").disabled = true;
  try {
    const {events_deleted: deleted} = await ask(`users/${part(who)}`, {method: "DELETE"});
    stored.drop(`person.${who}`);
    $("ask").close();
    if (state.who !== who) return;
    state.basket.clear(); state.hidden.clear();
    state.history = state.answer = null;
    showBasket();
    say(`Person ${who} is forgotten. ${plural(deleted ?? 0, "event was", "events were")} deleted.`);
    $("title").focus();
    await Promise.all([loadList(), loadHistory()]);
  } catch (error) {
    if (error.status === 401) { $("ask").close(); return askForKey(error.message); }
    $("ask-problem").hidden = false;
    $("ask-problem").textContent = `Not forgotten. ${error.title}: ${sentence(error.message)}`;
  } finally { $("ask-yes").disabled = false; }
}

// ---------------------------------------------------------------------------------------------- what a person does

const on = (id, event, does) => $(id).addEventListener(event, does);
const toHeading = id => { $(id).focus({preventScroll: true}); $(id).scrollIntoView({behavior: calm.matches ? "auto" : "smooth", block: "start"}); };

on("skip", "click", event => { event.preventDefault(); toHeading("recs-heading"); });
on("person-form", "submit", event => {
  event.preventDefault();
  const text = $("person").value.trim();
  if (!text) return $("person").focus();
  if (text === "." || text === "..") return say("A dot alone cannot be asked for here.");
  go(text);
});
on("person", "focus", () => $("person").select());
on("guest", "click", () => go(null));
on("tasks", "change", event => go(state.who, event.target.value));
on("search-form", "submit", event => { event.preventDefault(); lookFor($("search").value); });
on("search", "input", () => lookFor($("search").value));
on("history-more", "click", () => { state.allHistory = !state.allHistory; showHistory(state.history); });
on("model-chip", "click", () => toHeading("facts-heading"));
on("dock", "click", () => toHeading("basket-heading"));
on("live", "change", () => { if ($("live").checked) loadFigures(); });
on("down-retry", "click", () => { clearInterval(down.timer); tryAgain(); });
on("key-open", "click", () => { if (!$("key").hidden) return $("key-input").focus(); $("key-heading").textContent = "API key"; openKey(apiKey ? "A key is in use." : "Only needed where the service asks for one."); });
on("key-close", "click", () => { $("key").hidden = true; $("key-open").focus(); });
on("key-clear", "click", () => { apiKey = null; stored.drop("key"); $("key-input").value = ""; $("key").hidden = true; $("key-open").focus(); say("The key is forgotten."); loadAll(); });
on("key-form", "submit", event => {
  event.preventDefault();
  const given = $("key-input").value.trim();
  if (!given) return $("key-input").focus();
  apiKey = given;
  stored.set("key", given);
  $("key-input").value = "";
  $("key").hidden = true;
  $("title").focus({preventScroll: true});
  loadAll();
});
on("forget", "click", () => {
  $("ask-title").textContent = `Forget person ${state.who}?`;
  $("ask-text").textContent = "Everything that the service keeps of this person is deleted, and the model no longer uses what it learned from them. This cannot be undone.";
  $("ask-problem").hidden = true;
  showDialog($("ask"));
  $("ask-no").focus();
});
on("ask-no", "click", () => $("ask").close());
on("ask-yes", "click", forget);
on("sheet-close", "click", closeSheet);
on("sheet-back", "click", () => { state.sheet.pop(); showSheet(); $("sheet-title").focus(); });
on("sheet", "click", event => { if (event.target === $("sheet")) closeSheet(); });
// where the button that opened it was drawn anew meanwhile, the focus goes to its successor, else to the list
on("sheet", "close", () => {
  const [item] = state.sheet, active = document.activeElement;
  state.sheet = [];
  if (active && active !== document.body && !$("sheet").contains(active)) return;
  const again = item && document.querySelector(`main li[data-key="${CSS.escape(keyOf(item.item_id))}"] [data-act=open]`);
  (again ?? $("recs-heading")).focus({preventScroll: true});
});
$("rules-samples").append(...Object.keys(SAMPLES).map(kind => h("button", {type: "button", class: "chip", on: {click: () => addSample(kind)}}, `+ ${kind}`)));
on("rules-text", "input", judge);
on("rules-form", "submit", event => { event.preventDefault(); saveRules(); });
on("rules-reset", "click", () => { $("rules-text").value = shop.saved; judge(); });
on("rules-delete", "click", deleteRules);
on("preview-form", "submit", event => event.preventDefault());
for (const id of ["preview-place", "preview-day"]) on(id, "input", judge);
on("product-form", "submit", event => { event.preventDefault(); tellProduct(); });
on("product-id", "input", lookUp);
on("product-delete", "click", deleteProduct);
on("product-next", "click", anotherProduct);
// what products are described by is asked for when somebody comes near
new IntersectionObserver((seen, observer) => { if (seen.some(one => one.isIntersecting)) { observer.disconnect(); newcomer.near = true; loadFields(); } }, {rootMargin: "600px"}).observe($("newcomer"));
addEventListener("popstate", follow);
addEventListener("hashchange", () => { const {who, task} = address(); if (!state.started || who !== state.who || task !== state.task) follow(); });

loadAll();
