// Two answers, word by word.

// Which words of `a` and of `b` are not in their longest common subsequence: [boolean[], boolean[]], true where they differ.
export function difference(a, b) {
  const same = Array.from({ length: a.length + 1 }, () => new Array(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      same[i][j] = a[i] === b[j] ? same[i + 1][j + 1] + 1 : Math.max(same[i + 1][j], same[i][j + 1]);
    }
  }
  const changed = [a.map(() => true), b.map(() => true)];
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) {
      changed[0][i++] = changed[1][j++] = false;
    } else if (same[i + 1][j] >= same[i][j + 1]) {
      i++;
    } else {
      j++;
    }
  }
  return changed;
}

export function split(answer) {
  return answer.trim().split(/\s+/).filter(Boolean);
}

// The words as nodes, those that differ marked.
export function marked(words, changed) {
  return words.flatMap((word, i) => {
    if (!changed[i]) return [word, " "];
    const mark = document.createElement("mark");
    mark.textContent = word;
    return [mark, " "];
  });
}

export function percent(share, digits = 0) {
  return `${(100 * share).toFixed(digits)} %`;
}

export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}
