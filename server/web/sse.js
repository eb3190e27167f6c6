/**
 * An incremental parser of server-sent events (HTML standard, section 9.2.6).
 *
 * `push(bytes)` takes the next part of the body, cut anywhere (inside a UTF-8 character, inside a line, between CR and LF),
 * and returns the data of every event that it completes. Comments and fields other than `data` are skipped; an event that
 * the end of the stream cuts off is never returned.
 *
 * @returns {{push: (bytes: Uint8Array) => string[]}}
 */
export function createSseParser() {
  const decoder = new TextDecoder(); // drops one leading byte order mark, holds back an incomplete character
  let rest = ""; // the line that has no end yet
  let data = []; // data lines of the event that has no end yet
  let skipLineFeed = false; // the last part ended in CR: a line feed that follows belongs to the same line end

  function takeLine(line, events) {
    if (line === "") {
      if (data.length > 0) events.push(data.join("\n"));
      data = [];
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    if (field !== "data") return;
    const value = colon < 0 ? "" : line.slice(colon + 1);
    data.push(value.startsWith(" ") ? value.slice(1) : value);
  }

  return {
    push(bytes) {
      const events = [];
      let text = decoder.decode(bytes, { stream: true });
      if (text === "") return events;
      if (skipLineFeed && text[0] === "\n") text = text.slice(1);
      skipLineFeed = text === "" ? false : text.endsWith("\r");
      const lines = text.split(/\r\n|\r|\n/);
      lines[0] = rest + lines[0];
      rest = lines.pop();
      for (const line of lines) takeLine(line, events);
      return events;
    },
  };
}
