import streamlit as st

st.write('streamlit is here')
word = st.text_input('word')
if word:
    st.write('said ' + word.upper())
up = st.file_uploader('file')
if up:
    st.write('got %d bytes' % len(up.read()))
