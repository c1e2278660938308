//! As much of Rust's grammar as the rules need: which bytes are code, and which code is there only for tests.

use std::ops::Range;

/// The text with comments and the contents of literals blanked. Same length, same line ends.
pub(super) fn blank_words(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => find(bytes, at, b"\n"),
            b'/' if bytes[at..].starts_with(b"/*") => end_of_block_comment(bytes, at),
            b'"' => end_of_string(bytes, at),
            b'r' if !is_word(bytes, at.wrapping_sub(1)) || bytes.get(at.wrapping_sub(1)) == Some(&b'b') => {
                end_of_raw_string(bytes, at).unwrap_or(at)
            }
            b'\'' => end_of_character(source, at).unwrap_or(at),
            _ => at,
        };
        if end == at {
            at += 1;
            continue;
        }
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    String::from_utf8(out).expect("whole literals and comments were replaced by blanks, byte for byte")
}

fn is_word(bytes: &[u8], at: usize) -> bool {
    bytes.get(at).is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_')
}

/// Where `pattern` begins at or after `from`, or the end.
fn find(bytes: &[u8], from: usize, pattern: &[u8]) -> usize {
    bytes[from..].windows(pattern.len()).position(|window| window == pattern).map_or(bytes.len(), |at| from + at)
}

fn end_of_block_comment(bytes: &[u8], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0_usize);
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

fn end_of_string(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// `r"…"`, `r#"…"#`, with `start` at the `r`; `None` for a word or a raw identifier.
fn end_of_raw_string(bytes: &[u8], start: usize) -> Option<usize> {
    let hashes = bytes[start + 1..].iter().take_while(|&&byte| byte == b'#').count();
    let open = start + 1 + hashes;
    if bytes.get(open) != Some(&b'"') {
        return None;
    }
    let mut close = vec![b'"'];
    close.resize(1 + hashes, b'#');
    Some((find(bytes, open + 1, &close) + close.len()).min(bytes.len()))
}

/// `'x'`, `'\n'`; `None` for a lifetime.
fn end_of_character(source: &str, start: usize) -> Option<usize> {
    let mut rest = source[start + 1..].char_indices();
    let (_, first) = rest.next()?;
    if first == '\\' {
        let (_, escaped) = rest.next()?;
        // The escaped character may itself be a quote.
        let from = start + 2 + escaped.len_utf8();
        return source[from..].find('\'').map(|at| from + at + 1);
    }
    let (at, second) = rest.next()?;
    (second == '\'').then_some(start + 1 + at + 1)
}

/// The byte ranges of items under `#[cfg(test)]` or `#[cfg(all(test, …))]`; `code` comes from [`blank_words`].
pub(super) fn test_items(code: &str) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut from = 0;
    while let Some(at) = code[from..].find("#[cfg(").map(|at| from + at) {
        let close = closing(code, at + 1);
        let condition: String = code[at + "#[cfg(".len()..close].chars().filter(|c| !c.is_whitespace()).collect();
        if condition == "test)" || condition.starts_with("all(test,") {
            let end = end_of_item(code, close + 1);
            ranges.push(at..end);
            from = end;
        } else {
            from = close;
        }
    }
    ranges
}

/// Names of modules that are declared under `#[cfg(test)]` and live in files of their own.
pub(super) fn test_modules(code: &str) -> Vec<String> {
    let ends_with_name = |item: &str| {
        let name = item.trim_end().strip_suffix(';')?.rsplit("mod ").next()?.trim().to_owned();
        name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_').then_some(name)
    };
    test_items(code)
        .into_iter()
        .map(|range| &code[range])
        .filter(|item| item.contains("mod "))
        .filter_map(ends_with_name)
        .collect()
}

/// The index of the bracket that closes the one at `open`, or the last byte.
fn closing(code: &str, open: usize) -> usize {
    let mut depth = 0_usize;
    for (at, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return at;
                }
            }
            _ => {}
        }
    }
    code.len().saturating_sub(1)
}

/// Where the item that begins after its attribute ends: after its body, or after its semicolon.
fn end_of_item(code: &str, from: usize) -> usize {
    let mut at = from;
    let bytes = code.as_bytes();
    while at < bytes.len() {
        match bytes[at] {
            b';' | b',' => return at + 1,
            b'{' => return closing(code, at) + 1,
            // Parameters and further attributes may hold commas and braces.
            b'(' | b'[' => at = closing(code, at) + 1,
            _ => at += 1,
        }
    }
    code.len()
}

/// The line, from 1, of a byte.
pub(super) fn line_of(text: &str, at: usize) -> usize {
    text[..at].bytes().filter(|&byte| byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_code_stays() {
        let source = "let a = \"use x::*; \\\" {\"; // use y::*\nlet b = '{'; let c: &'a str = r#\"}\"\"#; /* { /* */ } */ d('\\'');";
        let code = blank_words(source);
        assert_eq!(code.len(), source.len());
        assert!(!code.contains('{') && !code.contains('}') && !code.contains('*'), "{code}");
        assert!(code.contains("&'a str") && code.ends_with("d(    );"), "{code}");
        assert_eq!(blank_words("br\"{\" r#type for"), "b     r#type for");
    }

    #[test]
    fn only_code_under_cfg_test_is_test_code() {
        let source = "fn a() {}\n#[cfg(test)]\n#[allow(x)]\nmod tests { fn b() { if x {} } }\nfn c() {}\n\
                      #[cfg(not(test))]\nfn d() {}\n#[cfg(all(test, unix))] fn e(f: (u8, u8)) -> u8 { 1 }\n\
                      #[cfg(test)]\nmod oracle;\nfn g() {}";
        let code = blank_words(source);
        let kept: Vec<&str> = test_items(&code).into_iter().map(|range| &source[range]).collect();
        assert_eq!(kept.len(), 3, "{kept:?}");
        assert!(kept[0].ends_with("fn b() { if x {} } }"));
        assert!(kept[1].ends_with("{ 1 }"));
        assert_eq!(kept[2], "#[cfg(test)]\nmod oracle;");
        assert_eq!(test_modules(&code), ["oracle"]);
    }
}
