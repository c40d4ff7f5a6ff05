//! PostgreSQL keeps no NUL in a text. In what is stored it is U+F8FF and a `0`; U+F8FF itself is followed by a `1`.

use std::borrow::Cow;

const MARK: char = '\u{f8ff}';
const NUL: &str = "\u{f8ff}0";
const ITSELF: &str = "\u{f8ff}1";
/// How JSON says NUL.
const ESCAPE: &str = "\\u0000";

/// A text as it is stored.
pub fn seal(text: &str) -> String {
    text.replace(MARK, ITSELF).replace('\0', NUL)
}

/// The text as it was.
pub fn unseal(text: &str) -> Cow<'_, str> {
    opened(text, "\0")
}

/// JSON as it is stored: a text in it is the one that [`seal`] makes.
pub fn seal_json(json: &str) -> String {
    let json = json.replace(MARK, ITSELF);
    if !json.contains(ESCAPE) {
        return json;
    }
    // An escape is taken whole: what follows an escaped backslash is no escape.
    let mut sealed = String::with_capacity(json.len());
    let mut rest = json.as_str();
    while let Some(place) = rest.find('\\') {
        let (before, escape) = rest.split_at(place);
        sealed.push_str(before);
        rest = match escape.strip_prefix(ESCAPE) {
            Some(after) => {
                sealed.push_str(NUL);
                after
            }
            None => {
                let (taken, after) = escape.split_at_checked(2).unwrap_or((escape, ""));
                sealed.push_str(taken);
                after
            }
        };
    }
    sealed.push_str(rest);
    sealed
}

/// The JSON as it was.
pub fn unseal_json(json: &str) -> Cow<'_, str> {
    opened(json, ESCAPE)
}

fn opened<'t>(sealed: &'t str, nul: &str) -> Cow<'t, str> {
    match sealed.contains(MARK) {
        true => Cow::Owned(sealed.replace(NUL, nul).replace(ITSELF, "\u{f8ff}")),
        false => Cow::Borrowed(sealed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_postgresql_does_not_keep_comes_back_as_it_was() {
        for text in [
            "plain",
            "a\0b",
            "\u{f8ff}0",
            "\\u0000",
            "\\\\u0000",
            "\0\u{f8ff}\0",
            "\\",
            "猫\n\0",
        ] {
            assert!(!seal(text).contains('\0'));
            assert_eq!(unseal(&seal(text)), text);
            let json = seal_json(&serde_json::to_string(text).unwrap());
            assert_eq!(serde_json::from_str::<String>(&unseal_json(&json)).unwrap(), text);
            // What is in the JSON, as the database reads it, is what a filter looks for.
            assert_eq!(serde_json::from_str::<String>(&json).unwrap(), seal(text));
        }
    }
}
