//! Messages as JSON, in protobuf's own mapping: what the command line prints and reads is what grpcurl does.

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

/// All contracts.
pub static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(aeterna_proto::DESCRIPTOR_SET).expect("the descriptor set is made by our own build")
});

/// A message as JSON, indented; `name` is its full name.
///
/// # Errors
/// When there is no message of that name.
pub fn to_json(name: &str, message: &impl Message) -> anyhow::Result<String> {
    formatted(name, message, serde_json::ser::PrettyFormatter::new())
}

/// A message as JSON in one line; `name` is its full name.
///
/// # Errors
/// When there is no message of that name.
pub fn to_line(name: &str, message: &impl Message) -> anyhow::Result<String> {
    formatted(name, message, serde_json::ser::CompactFormatter)
}

fn formatted(name: &str, message: &impl Message, formatter: impl serde_json::ser::Formatter) -> anyhow::Result<String> {
    let mut dynamic = empty(name)?;
    dynamic.merge(message.encode_to_vec().as_slice())?;
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    dynamic.serialize_with_options(&mut serializer, &SerializeOptions::new())?;
    Ok(String::from_utf8(out)?)
}

/// A message from JSON; unknown fields are refused by name.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn from_json<M: Message + Default>(name: &str, text: &str) -> Result<M, String> {
    let descriptor = POOL.get_message_by_name(name).ok_or("there is no such message")?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let dynamic = DynamicMessage::deserialize(descriptor, &mut deserializer).map_err(|error| error.to_string())?;
    deserializer.end().map_err(|error| error.to_string())?;
    M::decode(dynamic.encode_to_vec().as_slice()).map_err(|error| error.to_string())
}

fn empty(name: &str) -> anyhow::Result<DynamicMessage> {
    let descriptor = POOL.get_message_by_name(name);
    Ok(DynamicMessage::new(descriptor.ok_or_else(|| {
        anyhow::anyhow!("the contracts have no message `{name}`")
    })?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use aeterna_proto::memory::v1::Memory;

    #[test]
    fn memories_are_read_as_grpcurl_reads_them_and_printed_the_same() {
        let text = r#"{"content": "a", "eventAt": "2023-05-08T13:56:00Z", "metadata": {"n": [1, null]}, "scope": {"user": "ann"}}"#;
        let memory: Memory = from_json("aeterna.memory.v1.Memory", text).unwrap();
        assert_eq!(memory.event_at.unwrap().seconds, 1_683_554_160);
        let printed = to_json("aeterna.memory.v1.Memory", &memory).unwrap();
        assert_eq!(
            from_json::<Memory>("aeterna.memory.v1.Memory", &printed).unwrap(),
            memory
        );
    }

    #[test]
    fn what_the_contract_does_not_know_is_refused_by_name() {
        for (text, word) in [
            (r#"{"contents": "a"}"#, "contents"),
            (r#"{"content": 5}"#, "string"),
            (r#"{"content": "a"} x"#, "trailing"),
        ] {
            let error = from_json::<Memory>("aeterna.memory.v1.Memory", text).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
