//! From text to a typed filter. The grammar is AIP-160's (OR binds tighter than AND, side by side means AND), with `IN`.

use aeterna_types::{Layer, Timestamp};

use super::{Comparison, Condition, Field, Filter, Literal, NumberField, TextField, TimeField};

/// What a filter may be made of, for messages.
const HELP: &str = "use id, content, tags, importance, version, layer, created_at, updated_at, event_at, valid_at, \
                        invalid_at, expires_at, deleted_at, superseded_by, scope.<layer>, source.conversation, \
                        source.sequence, source.speaker, source.caption, source.reference or metadata.<path>";

const MAX_BYTES: usize = 8192;
const MAX_TESTS: usize = 200;
const MAX_DEPTH: usize = 32;

/// Parses a filter; an empty one is `None`.
///
/// # Errors
/// A sentence that says what is wrong and where.
pub fn parse(text: &str) -> Result<Option<Filter>, String> {
    if text.len() > MAX_BYTES {
        return Err(format!("has {} bytes; send at most {MAX_BYTES}", text.len()));
    }
    let mut parser = Parser {
        tokens: tokens(text)?,
        next: 0,
        tests: 0,
        depth: 0,
    };
    if parser.tokens.is_empty() {
        return Ok(None);
    }
    let filter = parser.expression()?;
    match parser.peek() {
        None => Ok(Some(filter)),
        Some(token) => Err(parser.unexpected(token, "AND, OR or the end")),
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    /// A word as it stands: a name, keyword, number, time or plain text.
    Word(String),
    /// A quoted text.
    Quoted(String),
    /// A comparison.
    Compare(Comparison),
    Has,
    Open,
    Close,
    Comma,
    Minus,
    Star,
}

#[derive(Clone, Debug)]
struct Token {
    kind: Kind,
    /// Where it begins, in characters from 1.
    at: usize,
}

/// Characters that a word may have; `:` belongs to times, and is looked at separately.
fn is_word(c: char) -> bool {
    c.is_alphanumeric() || "_.-+/@".contains(c)
}

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let chars: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let mut i = 0;
    while let Some(&c) = chars.get(i) {
        let at = i + 1;
        let second = chars.get(i + 1) == Some(&'=');
        let (kind, length) = match c {
            c if c.is_whitespace() => {
                i += 1;
                continue;
            }
            '(' => (Kind::Open, 1),
            ')' => (Kind::Close, 1),
            ',' => (Kind::Comma, 1),
            ':' => (Kind::Has, 1),
            '*' => (Kind::Star, 1),
            '=' => (Kind::Compare(Comparison::Equal), 1),
            '!' if second => (Kind::Compare(Comparison::NotEqual), 2),
            '<' if second => (Kind::Compare(Comparison::LessOrEqual), 2),
            '>' if second => (Kind::Compare(Comparison::GreaterOrEqual), 2),
            '<' => (Kind::Compare(Comparison::Less), 1),
            '>' => (Kind::Compare(Comparison::Greater), 1),
            '"' | '\'' => quoted(&chars, i)?,
            // A minus before a name or a bracket negates; before a digit it is a sign.
            '-' if !chars.get(i + 1).is_some_and(char::is_ascii_digit) => (Kind::Minus, 1),
            c if is_word(c) => word(&chars, i),
            c => return Err(format!("has {c:?} at character {at}; put text into quotes")),
        };
        tokens.push(Token { kind, at });
        i += length;
    }
    Ok(tokens)
}

fn quoted(chars: &[char], start: usize) -> Result<(Kind, usize), String> {
    let quote = chars[start];
    let mut text = String::new();
    let mut i = start + 1;
    while let Some(&c) = chars.get(i) {
        match c {
            '\\' => {
                let escaped = chars.get(i + 1).copied();
                text.push(match escaped {
                    Some('n') => '\n',
                    Some('t') => '\t',
                    Some(c @ ('\\' | '"' | '\'')) => c,
                    _ => {
                        return Err(format!(
                            "has an unknown escape at character {}; write \\\\ for a backslash",
                            i + 1
                        ));
                    }
                });
                i += 2;
            }
            c if c == quote => return Ok((Kind::Quoted(text), i + 1 - start)),
            c => {
                text.push(c);
                i += 1;
            }
        }
    }
    Err(format!(
        "has a text that begins at character {} and does not end",
        start + 1
    ))
}

fn word(chars: &[char], start: usize) -> (Kind, usize) {
    let mut end = start;
    while let Some(&c) = chars.get(end) {
        // A colon between digits belongs to a time, as in 2024-01-01T10:30:00Z.
        let in_time = c == ':'
            && chars[start].is_ascii_digit()
            && chars[start..end].contains(&'T')
            && chars.get(end + 1).is_some_and(char::is_ascii_digit);
        if !is_word(c) && !in_time {
            break;
        }
        end += 1;
    }
    (Kind::Word(chars[start..end].iter().collect()), end - start)
}

struct Parser {
    tokens: Vec<Token>,
    next: usize,
    tests: usize,
    depth: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.next)
    }

    fn take(&mut self, kind: &Kind) -> bool {
        let found = self.peek().is_some_and(|token| token.kind == *kind);
        self.next += usize::from(found);
        found
    }

    fn is_keyword(&self, keyword: &str) -> bool {
        matches!(self.peek(), Some(Token { kind: Kind::Word(word), .. }) if word == keyword)
    }

    fn keyword(&mut self, keyword: &str) -> bool {
        let found = self.is_keyword(keyword);
        self.next += usize::from(found);
        found
    }

    fn unexpected(&self, token: &Token, wanted: &str) -> String {
        let shown = match &token.kind {
            Kind::Word(text) | Kind::Quoted(text) => text.chars().take(40).collect(),
            Kind::Compare(_) => "a comparison".to_owned(),
            Kind::Has => ":".to_owned(),
            Kind::Open => "(".to_owned(),
            Kind::Close => ")".to_owned(),
            Kind::Comma => ",".to_owned(),
            Kind::Minus => "-".to_owned(),
            Kind::Star => "*".to_owned(),
        };
        format!("has `{shown}` at character {}, where {wanted} is expected", token.at)
    }

    fn wanted(&self, wanted: &str) -> String {
        match self.peek() {
            Some(token) => self.unexpected(token, wanted),
            None => format!("ends where {wanted} is expected"),
        }
    }

    fn expression(&mut self) -> Result<Filter, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("is nested deeper than {MAX_DEPTH} levels"));
        }
        let mut all = vec![self.factor()?];
        loop {
            let joined = self.keyword("AND");
            let ends = matches!(self.peek(), None | Some(Token { kind: Kind::Close, .. }));
            if ends && !joined {
                break;
            }
            all.push(self.factor()?);
        }
        self.depth -= 1;
        Ok(one_or(all, Filter::All))
    }

    fn factor(&mut self) -> Result<Filter, String> {
        let mut any = vec![self.term()?];
        while self.keyword("OR") {
            any.push(self.term()?);
        }
        Ok(one_or(any, Filter::Any))
    }

    fn term(&mut self) -> Result<Filter, String> {
        if self.keyword("NOT") || self.take(&Kind::Minus) {
            return Ok(Filter::Not(Box::new(self.simple()?)));
        }
        self.simple()
    }

    fn simple(&mut self) -> Result<Filter, String> {
        if self.take(&Kind::Open) {
            let inner = self.expression()?;
            return match self.take(&Kind::Close) {
                true => Ok(inner),
                false => Err(self.wanted("`)`")),
            };
        }
        self.restriction()
    }

    fn restriction(&mut self) -> Result<Filter, String> {
        let name = match self.peek() {
            Some(Token {
                kind: Kind::Word(word), ..
            }) if !["AND", "OR", "NOT", "IN"].contains(&word.as_str()) => word.clone(),
            _ => return Err(self.wanted("a field")),
        };
        self.next += 1;
        let field = field(&name)?;
        if self.keyword("IN") {
            return self.list(&name, &field, Some(Comparison::Equal), false);
        }
        let operator = match self.peek().map(|token| &token.kind) {
            Some(Kind::Compare(comparison)) => Some(*comparison),
            Some(Kind::Has) => None,
            _ => return Err(self.wanted("one of = != < <= > >= : IN")),
        };
        self.next += 1;
        if self.peek().is_some_and(|token| token.kind == Kind::Open) {
            if operator.is_some_and(|operator| operator != Comparison::Equal) {
                return Err(format!("compares `{name}` with a list; only `=`, `:` and IN take one"));
            }
            return self.list(&name, &field, operator, true);
        }
        let condition = self.argument(&name, &field, operator)?;
        self.test(field, condition)
    }

    /// `(a, b)` after IN, `(a OR b)` after an operator: one of them.
    fn list(
        &mut self,
        name: &str,
        field: &Field,
        operator: Option<Comparison>,
        with_or: bool,
    ) -> Result<Filter, String> {
        if !self.take(&Kind::Open) {
            return Err(self.wanted("`(`"));
        }
        let mut any = Vec::new();
        loop {
            // An item of tags is had, not compared.
            let operator = operator.filter(|_| *field != Field::Tags);
            let condition = self.argument(name, field, operator)?;
            any.push(self.test(field.clone(), condition)?);
            let more = if with_or {
                self.keyword("OR")
            } else {
                self.take(&Kind::Comma)
            };
            if !more {
                break;
            }
        }
        match self.take(&Kind::Close) {
            true => Ok(one_or(any, Filter::Any)),
            false => Err(self.wanted(if with_or { "OR or `)`" } else { "`,` or `)`" })),
        }
    }

    fn test(&mut self, field: Field, condition: Condition) -> Result<Filter, String> {
        self.tests += 1;
        if self.tests > MAX_TESTS {
            return Err(format!("has more than {MAX_TESTS} tests"));
        }
        Ok(Filter::Test(field, condition))
    }

    fn argument(&mut self, name: &str, field: &Field, operator: Option<Comparison>) -> Result<Condition, String> {
        if operator.is_none() && self.take(&Kind::Star) {
            return Ok(Condition::Present);
        }
        let negative = self.take(&Kind::Minus);
        let (text, quoted) = match self.peek().map(|token| &token.kind) {
            Some(Kind::Word(word)) => (word.clone(), false),
            Some(Kind::Quoted(text)) if !negative => (text.clone(), true),
            Some(Kind::Star) => {
                return Err(format!(
                    "has `*` after `{name}`; wildcards are not supported, `:` finds parts of a text"
                ));
            }
            _ => return Err(self.wanted("a value")),
        };
        let text = if negative { format!("-{text}") } else { text };
        self.next += 1;
        let literal = literal(name, field, text, quoted)?;
        let refused = |why: &str| Err(format!("can't ask that of `{name}`: {why}"));
        match (operator, field, &literal) {
            (Some(operator), Field::Text(_) | Field::Layer, _) if operator.is_ordered() => {
                refused("it takes =, !=, : and IN")
            }
            (Some(_), Field::Tags, _) => refused("tags take `:`, for instance tags:\"travel\""),
            (Some(operator), Field::Metadata(_), Literal::Text(_) | Literal::Bool(_) | Literal::Null)
                if operator.is_ordered() =>
            {
                refused("only numbers are ordered in metadata")
            }
            (Some(_), Field::Metadata(path), _) if path.is_empty() => refused("name a key: metadata.key"),
            (None, Field::Metadata(_), Literal::Null) => refused("`:*` asks whether there is a value"),
            (None, Field::Number(_) | Field::Time(_) | Field::Layer, _) => {
                Ok(Condition::Compare(Comparison::Equal, literal))
            }
            (None, _, _) => Ok(Condition::Has(literal)),
            (Some(operator), _, _) => Ok(Condition::Compare(operator, literal)),
        }
    }
}

fn one_or(mut filters: Vec<Filter>, many: fn(Vec<Filter>) -> Filter) -> Filter {
    match (filters.len(), filters.pop()) {
        (1, Some(only)) => only,
        (_, Some(last)) => {
            filters.push(last);
            many(filters)
        }
        (_, None) => many(filters),
    }
}

fn field(name: &str) -> Result<Field, String> {
    if name == "metadata" {
        return Ok(Field::Metadata(Vec::new()));
    }
    if let Some(path) = name.strip_prefix("metadata.") {
        let path: Vec<String> = path.split('.').map(str::to_owned).collect();
        if path.iter().any(String::is_empty) || path.len() > 8 {
            return Err(format!(
                "has the path `{name}`; write 1 to 8 keys with a dot between them"
            ));
        }
        return Ok(Field::Metadata(path));
    }
    if let Some(layer) = name.strip_prefix("scope.") {
        let known = Layer::ALL.into_iter().find(|known| known.name() == layer);
        return known
            .map(|layer| Field::Text(TextField::Scope(layer)))
            .ok_or_else(|| unknown(name));
    }
    Ok(match name {
        "id" => Field::Text(TextField::Id),
        "content" => Field::Text(TextField::Content),
        "source.conversation" => Field::Text(TextField::Conversation),
        "source.speaker" => Field::Text(TextField::Speaker),
        "source.caption" => Field::Text(TextField::Caption),
        "source.reference" => Field::Text(TextField::Reference),
        "superseded_by" => Field::Text(TextField::SupersededBy),
        "importance" => Field::Number(NumberField::Importance),
        "version" => Field::Number(NumberField::Version),
        "source.sequence" => Field::Number(NumberField::Sequence),
        "created_at" => Field::Time(TimeField::Created),
        "updated_at" => Field::Time(TimeField::Updated),
        "event_at" => Field::Time(TimeField::Event),
        "valid_at" => Field::Time(TimeField::Valid),
        "invalid_at" => Field::Time(TimeField::Invalid),
        "expires_at" => Field::Time(TimeField::Expires),
        "deleted_at" => Field::Time(TimeField::Deleted),
        "layer" => Field::Layer,
        "tags" => Field::Tags,
        _ => return Err(unknown(name)),
    })
}

fn unknown(name: &str) -> String {
    let shown: String = name.chars().take(64).collect();
    format!("names the field `{shown}`, which there is not; {HELP}")
}

/// The value in the field's type. In metadata, which has no types, quotes make a text; without them a word is a number,
/// `true`, `false` or `null` when it looks like one.
fn literal(name: &str, field: &Field, text: String, quoted: bool) -> Result<Literal, String> {
    let shown: String = text.chars().take(64).collect();
    let number = || text.parse::<f64>().ok().filter(|number| number.is_finite());
    match field {
        Field::Text(_) | Field::Tags => Ok(Literal::Text(text)),
        Field::Number(field) => text
            .parse::<i64>()
            .ok()
            .filter(|_| *field != NumberField::Importance)
            .map(Literal::Whole)
            .or_else(|| number().map(Literal::Number))
            .ok_or_else(|| format!("compares `{name}` with `{shown}`, which is no number")),
        Field::Time(_) => parse_time(&text).map(Literal::Time).ok_or_else(|| {
            format!(
                "compares `{name}` with `{shown}`, which is no time; write \"2024-01-31T10:30:00Z\" or \"2024-01-31\""
            )
        }),
        Field::Layer => {
            let lower = text.to_lowercase();
            let short = lower.strip_prefix("layer_").unwrap_or(&lower);
            let known = Layer::ALL.into_iter().find(|layer| layer.name() == short);
            known.map(Literal::Layer).ok_or_else(|| {
                let names: Vec<_> = Layer::ALL.iter().map(|layer| layer.name()).collect();
                format!("compares `layer` with `{shown}`; the layers are {}", names.join(", "))
            })
        }
        Field::Metadata(_) if quoted => Ok(Literal::Text(text)),
        Field::Metadata(_) => Ok(match (text.as_str(), number()) {
            ("true", _) => Literal::Bool(true),
            ("false", _) => Literal::Bool(false),
            ("null", _) => Literal::Null,
            (_, Some(number)) if !text.contains(|c: char| c.is_alphabetic() && c != 'e' && c != 'E') => {
                Literal::Number(number)
            }
            _ => Literal::Text(text),
        }),
    }
}

fn parse_time(text: &str) -> Option<Timestamp> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(text: &str) -> String {
        fn show(filter: &Filter) -> String {
            let list = |filters: &[Filter]| filters.iter().map(show).collect::<Vec<_>>().join(" ");
            match filter {
                Filter::All(all) => format!("(and {})", list(all)),
                Filter::Any(any) => format!("(or {})", list(any)),
                Filter::Not(inner) => format!("(not {})", show(inner)),
                Filter::Test(field, condition) => format!("[{field:?} {condition:?}]"),
            }
        }
        show(&parse(text).unwrap().unwrap()).replace("Compare(Equal, ", "(")
    }

    #[test]
    fn or_binds_tighter_than_and_as_in_aip_160() {
        let (a, b, c) = (
            "[Number(Version) (Whole(1))]",
            "[Number(Version) (Whole(2))]",
            "[Number(Version) (Whole(3))]",
        );
        assert_eq!(
            shape("version = 1 AND version = 2 OR version = 3"),
            format!("(and {a} (or {b} {c}))")
        );
        assert_eq!(shape("version=1 version=2"), format!("(and {a} {b})"));
        assert_eq!(
            shape("(version=1 AND version=2) OR version=3"),
            format!("(or (and {a} {b}) {c})")
        );
        assert_eq!(shape("NOT version=1 -version=2"), format!("(and (not {a}) (not {b}))"));
        assert_eq!(shape("version IN (1, 2)"), format!("(or {a} {b})"));
        assert_eq!(shape("version = (1 OR 2)"), format!("(or {a} {b})"));
    }

    #[test]
    fn values_take_the_type_of_their_field() {
        assert_eq!(shape("tags:travel"), "[Tags Has(Text(\"travel\"))]");
        assert_eq!(
            shape("tags IN (a, \"b c\")"),
            "(or [Tags Has(Text(\"a\"))] [Tags Has(Text(\"b c\"))])"
        );
        assert_eq!(shape("layer = LAYER_USER"), "[Layer (Layer(User))]");
        assert_eq!(
            shape("source.sequence = 1234567890123456789"),
            "[Number(Sequence) (Whole(1234567890123456789))]"
        );
        assert_eq!(shape("version = 1.5"), "[Number(Version) (Number(1.5))]");
        assert_eq!(shape("importance = 1"), "[Number(Importance) (Number(1.0))]");
        assert_eq!(shape("metadata.n = 5"), "[Metadata([\"n\"]) (Number(5.0))]");
        assert_eq!(shape("metadata.n = \"5\""), "[Metadata([\"n\"]) (Text(\"5\"))]");
        assert_eq!(
            shape("metadata.a.b = -1.5e3"),
            "[Metadata([\"a\", \"b\"]) (Number(-1500.0))]"
        );
        assert_eq!(shape("metadata.f = inf"), "[Metadata([\"f\"]) (Text(\"inf\"))]");
        assert_eq!(shape("metadata:key"), "[Metadata([]) Has(Text(\"key\"))]");
        assert_eq!(
            shape("event_at > 2024-01-31T10:30:00Z"),
            shape("event_at > \"2024-01-31T10:30:00Z\"")
        );
        assert_eq!(shape("event_at:*"), "[Time(Event) Present]");
        assert_eq!(
            shape(r#"content:"say \"hi\"""#),
            r#"[Text(Content) Has(Text("say \"hi\""))]"#
        );
        assert_eq!(parse("  ").unwrap(), None);
    }

    #[test]
    fn what_can_not_be_honoured_is_refused_by_name() {
        let deep = format!("{}version=1{}", "(".repeat(60), ")".repeat(60));
        let many = vec!["version=1"; 1000].join(" ");
        for (text, word) in [
            ("colour = red", "`colour`"),
            ("scope.planet = earth", "`scope.planet`"),
            ("content > a", "content"),
            ("tags = a", "tags:"),
            ("importance = high", "no number"),
            ("importance > NaN", "no number"),
            ("event_at > yesterday", "no time"),
            ("layer = floor", "company, org"),
            ("metadata.a > b", "only numbers"),
            ("metadata = 1", "name a key"),
            ("metadata..a = 1", "path"),
            ("content = a*", "character 12"),
            ("content = *", "wildcards"),
            ("version = 1 AND", "ends where a field"),
            ("version", "ends where one of"),
            ("(version = 1", "`)`"),
            ("version = 1)", "`)`"),
            ("content = \"a", "does not end"),
            ("content = \"\\x\"", "escape"),
            ("content = ä;", "';'"),
            ("version != (1 OR 2)", "only `=`"),
            (deep.as_str(), "nested deeper than 32"),
            (many.as_str(), "has "),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(parse(&"x".repeat(9000)).unwrap_err().contains("8192"));
    }
}
